// Single rankings: a list that can be narrowed, one with everything, and what the lead decides.

import { button, fill, make, openDialog, say } from "./dom.js";
import { named, words } from "./lead_tables.js";
import { ask } from "./net.js";
import { snippet, textBlock } from "./text.js";

export const DECISIONS = { pending: "pending", accepted: "accepted", excluded: "excluded", sent_back: "sent back" };
const SHOWS = [["all", "everything"], ["pending", "pending"], ["accepted", "accepted"], ["excluded", "excluded"],
  ["sent_back", "sent back"], ["skipped", "skipped"], ["noted", "with a note"]];
const ROLES = { user: "User", assistant: "Assistant", system: "System" };
const WHY = { repeat: "repeated", known: "known answer", overlap: "also ranked by others", first: "" };

const when = (seconds) => new Date(1000 * seconds).toLocaleString([], { dateStyle: "medium", timeStyle: "short" });

/** Return what a ranking says in one line. */
function said(row) {
  return row.skipped === null ? `Best first: ${row.order}` : "Skipped";
}

/**
 * Make the section of rows.
 * @param {(error: Error) => void} onError shows a refusal or silence
 * @param {() => void} onChange told after a decision, so that figures follow
 */
export function makeRows(onError, onChange) {
  const labeler = make("select", { id: "rows-labeler" });
  const show = make("select", { id: "rows-show" }, ...SHOWS.map(([value, text]) => make("option", { value, text })));
  const list = make("ul", { class: "rows" });
  const nothing = make("p", { class: "fine" });
  const more = button("Show more", () => load(next));
  const heading = make("h2", { id: "rows", tabIndex: -1, text: "Rows" });
  const root = make("section", { "aria-labelledby": "rows" }, heading,
    make("div", { class: "filters" }, make("label", { htmlFor: "rows-labeler", text: "Labeler" }, labeler),
      make("label", { htmlFor: "rows-show", text: "Show" }, show)), list, nothing, more);
  let next = null;
  let asked = 0;

  labeler.addEventListener("change", () => load());
  show.addEventListener("change", () => load());

  /** Fill in the labelers, and keep the choice. */
  function people(labelers) {
    const chosen = labeler.value;
    fill(labeler, make("option", { value: "", text: "all" }), ...labelers.map((one) => make("option", { value: String(one.id), text: one.code })));
    labeler.value = labelers.some((one) => String(one.id) === chosen) ? chosen : "";
  }

  /** Load the first rows, or those after an id. */
  async function load(before = null) {
    asked += 1;
    const mine = asked;
    const query = new URLSearchParams({ show: show.value });
    if (labeler.value) query.set("labeler", labeler.value);
    if (before !== null) query.set("before", String(before));
    try {
      const answer = await ask("GET", `/api/lead/rows?${query}`);
      if (mine !== asked) return; // another choice was made meanwhile
      if (before === null) list.replaceChildren();
      list.append(...answer.rows.map(item));
      next = answer.more;
      more.hidden = next === null;
      list.hidden = list.childElementCount === 0;
      nothing.hidden = !list.hidden;
      nothing.textContent = labeler.value || show.value !== "all" ? "No row is like that." : "Nobody has handed in a task yet.";
    } catch (error) {
      onError(error);
    }
  }

  /** Show the rows of one labeler, and go there. */
  async function look(id) {
    labeler.value = String(id);
    show.value = "all";
    await load();
    heading.focus({ preventScroll: true });
    heading.scrollIntoView();
  }

  function item(row) {
    const name = `${row.labeler}, task ${row.number}`;
    const decide = (decision) => (decision === "sent_back" ? askMessage(row, name) : judge(row, name, decision));
    const choice = (decision, text) => named(button(text, () => decide(decision), {
      "aria-pressed": String(row.decision === decision), "data-decision": decision,
    }), name);
    const facts = [row.labeler, `task ${row.number}`, when(row.made), `${Math.round(row.seconds)} s`, WHY[row.reason], row.kind].filter(Boolean).join(" · ");
    return make("li", { "data-verdict": row.id },
      make("div", {}, make("p", { class: "facts" }, make("span", { class: `badge ${row.decision}`, text: DECISIONS[row.decision] }), " ", words(facts)),
        make("p", { class: "opening" }, words(snippet(row.opening, 150) || "(empty)")),
        make("p", { class: "said", text: said(row) }),
        row.skipped !== null ? make("p", { class: "note" }, "Reason: ", words(row.skipped)) : null,
        row.note ? make("p", { class: "note" }, "Note: ", words(row.note)) : null,
        row.message ? make("p", { class: "note" }, "Your message: ", words(row.message)) : null),
      make("div", { class: "row" }, named(button("Look", () => open(row.id, name)), name), choice("accepted", "Accept"),
        choice("excluded", "Exclude"), choice("sent_back", "Send back …"),
        row.decision === "pending" ? null : named(button("Undo", () => judge(row, name, "pending"), { class: "quiet" }), name)));
  }

  /** Decide on a row; it is shown anew as the server has it. */
  async function judge(row, name, decision, message = "") {
    try {
      await ask("POST", `/api/lead/verdicts/${row.id}`, { decision, message, made: row.made });
      const old = list.querySelector(`[data-verdict="${row.id}"]`);
      if (old) {
        const changed = item({ ...row, decision, message });
        old.replaceWith(changed);
        (changed.querySelector(`[data-decision="${decision}"]`) || changed.querySelector("button")).focus();
      }
      say(`${name}: ${DECISIONS[decision]}.`);
      onChange();
    } catch (error) {
      onError(error);
      if (error.status === 409) load();
    }
  }

  function askMessage(row, name) {
    openMessage(`Send ${name} back`, `The labeler gets this task again, with your message. Until then the ranking does not count.`, "Send back",
      (message) => judge(row, name, "sent_back", message));
  }

  async function open(id, name) {
    try {
      showWhole(await ask("GET", `/api/lead/verdicts/${id}`), name);
    } catch (error) {
      onError(error);
    }
  }

  return { root, people, load, look };
}

/** Ask for a message (may stay empty) and hand it on. */
export function openMessage(title, text, action, onDone, withMessage = true) {
  const message = make("textarea", { id: "message", maxLength: 1000, rows: 3 });
  const form = make("form", { method: "dialog" }, make("p", { text }),
    ...(withMessage ? [make("label", { htmlFor: "message", text: "Message (may stay empty)" }), message] : []),
    make("div", { class: "row" }, make("button", { type: "submit", class: "main-action", text: action })));
  const dialog = openDialog(title, "small", form);
  if (withMessage) message.focus();
  else form.querySelector("button").focus();
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    dialog.close();
    onDone(message.value.trim());
  });
}

function likertLine(likert) {
  const flags = Object.entries(likert.flags || {}).filter(([, value]) => value).map(([flag]) => flag);
  return `Rated ${likert.overall ?? "not"}${flags.length > 0 ? `; ${flags.join(", ")}` : ""}`;
}

/** Show a ranking with its conversation and answers, and what others said. */
function showWhole(row, name) {
  const place = (answer) => (answer.place === null ? row.skipped === null ? "cannot judge" : "not ranked" : `place ${answer.place}`);
  openDialog(name, "wide",
    make("p", { text: said(row) }), row.skipped !== null ? make("p", {}, "Reason: ", words(row.skipped)) : null,
    row.confidence === null ? null : make("p", { text: `Confidence: ${row.confidence} of 5` }),
    row.note ? make("p", {}, "Note: ", words(row.note)) : null,
    make("h3", { text: "The conversation" }),
    ...row.prompt.map((turn, i) => make("div", { class: "answer" }, make("b", { text: ROLES[turn.role] || turn.role }), textBlock(turn.content, `turn ${i + 1}`))),
    make("h3", { text: "The answers, as they were shown" }),
    ...row.answers.map((answer) => make("div", { class: "answer" },
      make("b", { text: `Answer ${answer.label}: ${place(answer)}` }),
      make("p", { class: "soft" }, words([answer.models.join(", "), answer.known === null ? "" : `known place ${answer.known}`, answer.likert ? likertLine(answer.likert) : ""].filter(Boolean).join(" · "))),
      textBlock(answer.text, `answer ${answer.label}`))),
    row.others.length > 0 ? make("h3", { text: "What others said of this task, in the same letters" }) : null,
    row.others.length > 0 ? make("ul", {}, ...row.others.map((other) => make("li", {}, words(`${other.labeler}${WHY[other.reason] === "repeated" ? " (repeated)" : ""}: `),
      other.skipped === null ? other.order : words(`skipped: ${other.skipped}`)))) : null);
}
