// One task on the page: the conversation, the answers, the ranking, and what sends it.

import { makeBoard } from "./board.js";
import { describePlace, makeCard } from "./card.js";
import { openComparison } from "./compare.js";
import { openSame, openSkip } from "./dialogs.js";
import { button, make, say } from "./dom.js";
import { renderMarkdown } from "./markdown.js";
import { enableDragging } from "./drag.js";
import { padded, slotOf, unjudged } from "./draft.js";
import { makeSaver, unsent } from "./saving.js";
import { isJudged, makeSingleStep } from "./steps.js";
import { snippet, textBlock } from "./text.js";

const NOTE_PAUSE = 800; // ms after the last key until a note is sent
const TICK = 30_000; // ms between two signs of life
const FOLDED = "rlhf-rank-folded";
const ROLES = { user: "User", assistant: "Assistant", system: "System" };

/** Return the conversation with its turns. */
function conversation(prompt) {
  return make("section", { class: "conversation", "aria-label": "The conversation" },
    make("h2", { text: prompt.length > 1 ? "The conversation" : "The question" }),
    ...prompt.map((turn, i) => make("div", { class: `turn ${turn.role === "assistant" ? "assistant" : "other"}` },
      make("span", { class: "role", text: ROLES[turn.role] || turn.role }),
      textBlock(turn.content, prompt.length > 1 ? `turn ${i + 1}` : "the question"))));
}

/** Say that the lead sent the task back, and what the lead writes. */
function sentBack(message) {
  const words = message ? [make("span", { text: "The lead sent this task back to you and writes:" }), textBlock(message, "the message")]
    : [make("span", { text: "The lead sent this task back to you: please look at it again, and submit it." })];
  return make("div", { class: "banner sent-back", role: "status" }, ...words);
}

/** Return the guidelines, which fold away; the browser remembers whether they are folded. */
function guidelinesBeside(markdown) {
  const open = localStorage.getItem(FOLDED) !== "yes" && matchMedia("(min-width: 60rem)").matches;
  const details = make("details", { class: "guidelines", open }, make("summary", { text: "Guidelines" }), renderMarkdown(markdown));
  details.addEventListener("toggle", () => localStorage.setItem(FOLDED, details.open ? "no" : "yes"));
  return details;
}

/** Return the optional fields: how sure, and a note. */
function makeExtras(move) {
  const sure = make("fieldset", { class: "places sure" }, make("legend", { text: "How sure are you? (may stay empty)" }));
  for (let value = 1; value <= 5; value += 1) {
    const input = make("input", { type: "radio", name: "confidence", value: String(value), on: { change: () => move("confidence", { value }) } });
    const end = { 1: "a guess", 5: "certain" }[value];
    sure.append(make("label", { class: "place" }, input, make("span", { class: "number", text: String(value) }), end ? make("small", { text: end }) : null));
  }
  let timer = 0;
  const note = make("textarea", { id: "note", rows: 2, maxLength: 4000 });
  const send = () => {
    clearTimeout(timer);
    timer = 0;
    const text = note.value.trim();
    if (note.dataset.sent !== text) {
      note.dataset.sent = text;
      move("note", { text });
    }
  };
  note.addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(send, NOTE_PAUSE);
  });
  note.addEventListener("blur", send);
  const root = make("div", { class: "extras" }, sure, make("label", { htmlFor: "note", text: "A note (may stay empty)" }), note);
  const show = (draft) => {
    for (const input of sure.querySelectorAll("input")) input.checked = Number(input.value) === draft.confidence;
    if (document.activeElement !== note && timer === 0) {
      note.value = draft.note;
      note.dataset.sent = draft.note;
    }
  };
  return { root, show, send };
}

/**
 * Show a task and return what the page around it calls.
 * @param {Element} main
 * @param {object} assignment as `/api/next` gives it
 * @param {object} around `clock`, `onState(state, n)`, `onElsewhere()`, `onRefused(error)`,
 *   `onSubmit(saver)`, `onSkip(saver, reason)`, `guidelines` (Markdown), `keysOn()`
 */
export function showTask(main, assignment, around) {
  const { answers } = assignment;
  const ids = answers.map((answer) => answer.id);
  let draft = padded(assignment.draft, answers.length);
  let current = ids.find((id) => slotOf(draft, id) < 0) ?? ids[0];
  let showComparison = null;
  let single = null;
  const labelOf = (id) => answers.find((answer) => answer.id === id).label;

  const saver = makeSaver({
    id: assignment.id, seq: assignment.seq, canUndo: assignment.can_undo, draft, answers: answers.length, clock: around.clock,
    onDraft: (next) => {
      draft = next;
      showDraft();
    },
    onState: around.onState, onElsewhere: around.onElsewhere, onRefused: around.onRefused,
  });

  function move(kind, body = {}) {
    saver.move(kind, body);
    if (body.answer !== undefined && !["likert", "flag"].includes(kind)) {
      say(`Answer ${labelOf(body.answer)}: ${describePlace(draft, answers.find((answer) => answer.id === body.answer), answers)}.`);
    }
  }
  const act = {
    place: (id, slot) => slotOf(draft, id) !== slot && move("place", { answer: id, tier: slot }),
    askSame: (id) => {
      const placed = answers.filter((other) => other.id !== id && slotOf(draft, other.id) >= 0)
        .map((other) => ({ id: other.id, label: other.label, place: slotOf(draft, other.id) + 1, words: snippet(other.text) }));
      if (placed.length === 0) return;
      openSame(labelOf(id), placed, (as) => slotOf(draft, id) !== slotOf(draft, as) && move("same", { answer: id, as }));
    },
    aside: (id) => move(draft.set_aside.includes(id) ? "unaside" : "aside", { answer: id }),
    clear: (id) => {
      if (draft.set_aside.includes(id)) move("unaside", { answer: id });
      else if (slotOf(draft, id) >= 0) move("place", { answer: id, tier: null });
    },
    compare: (id) => {
      const other = ids[(ids.indexOf(id) + 1) % ids.length];
      const pair = ids.indexOf(id) < ids.indexOf(other) ? [id, other] : [other, id];
      showComparison = openComparison(answers, ...pair, { place: act.place, draft: () => draft });
    },
    focus: (id) => {
      if (current === id) return;
      current = id;
      showDraft();
    },
    goTo: (id) => focusCard(id),
    step: (id, by) => {
      const slot = slotOf(draft, id);
      const to = slot < 0 ? (by > 0 ? 0 : ids.length - 1) : Math.min(Math.max(slot + by, 0), ids.length - 1);
      act.place(id, to);
    },
  };

  const cards = answers.map((answer) => makeCard(answer, answers, act));
  const { board, show: showBoard } = makeBoard(answers, act);
  const extras = makeExtras(move);
  const missing = make("p", { class: "missing", id: "missing" });
  const submit = button("Submit ranking", trySubmit, { class: "main-action submit", "aria-describedby": "missing" });
  const undo = button("Undo", () => saver.move("undo"), { class: "undo" });
  const skip = button("Skip …", () => openSkip((reason) => around.onSkip(saver, reason)), { class: "quiet" });
  board.append(make("div", { class: "board-actions" }, missing, make("div", { class: "row" }, submit, undo, skip)));

  const ranking = make("div", { class: "ranking" },
    make("section", { class: "answers", "aria-label": "The answers" },
      make("h2", { text: `${answers.length} answers` }),
      make("p", { class: "how", text: "Read them, then give each a place: 1 is the best. The same place means equally good. Press a number, or drag an answer into “Your ranking”." }),
      ...cards.map(({ card }) => card), extras.root),
    make("div", { class: "side-column" }, board, guidelinesBeside(around.guidelines)));
  const again = assignment.steps?.likert ? button("Back to step 1: each answer alone", () => showStep(true), { class: "quiet" }) : null;
  if (again) ranking.querySelector(".answers").prepend(again);
  const place = make("div", { class: "place-of-step" });
  main.replaceChildren(make("div", { class: "task" }, assignment.sent_back ? sentBack(assignment.message) : null,
    conversation(assignment.task.prompt), place));

  function showStep(alone) {
    single = alone
      ? makeSingleStep(answers, assignment.steps.flags || [], {
        likert: (id, overall) => move("likert", { answer: id, overall }),
        flag: (id, flag, value) => move("flag", { answer: id, flag, value }),
        draft: () => draft,
        done: () => {
          showStep(false);
          focusCard(ids[0]);
        },
      })
      : null;
    place.replaceChildren(single ? single.root : ranking);
    document.body.classList.toggle("ranks", !single);
    showDraft();
  }

  /** Return why the ranking cannot be submitted yet, or "". */
  function whyNot() {
    const left = unjudged(draft, ids);
    if (left.length > 0) return `Without a place: ${left.map(labelOf).join(", ")}`;
    if (ids.length - draft.set_aside.length < 2) return "At least two answers need a place. Or skip this task.";
    return "";
  }

  function showDraft() {
    if (single) single.show(draft);
    for (const { show } of cards) show(draft, current);
    showBoard(draft);
    extras.show(draft);
    if (showComparison && document.querySelector("dialog.compare")) showComparison();
    const reason = whyNot();
    missing.textContent = reason || "Every answer has been judged.";
    missing.classList.toggle("other", reason !== "" && unjudged(draft, ids).length === 0);
    submit.setAttribute("aria-disabled", String(reason !== ""));
    undo.disabled = !saver.canUndo;
  }

  function trySubmit() {
    const reason = whyNot();
    if (reason === "") {
      extras.send();
      around.onSubmit(saver);
      return;
    }
    say(reason);
    missing.classList.add("attention");
    setTimeout(() => missing.classList.remove("attention"), 1500);
    const left = unjudged(draft, ids);
    if (left.length > 0) focusCard(left[0]);
  }

  function focusCard(id) {
    current = id;
    showDraft();
    const card = document.getElementById(`card-${id}`);
    card.focus({ preventScroll: true });
    card.scrollIntoView({ block: card.offsetHeight > innerHeight * 0.6 ? "start" : "nearest" });
  }

  /** Go on to the next answer that has not been judged. */
  function goOn() {
    const from = ids.indexOf(current);
    const order = [...ids.slice(from + 1), ...ids.slice(0, from)];
    const next = order.find((id) => unjudged(draft, ids).includes(id));
    focusCard(next ?? current);
  }

  function neighbour(by) {
    const at = ids.indexOf(current) + by;
    if (at >= 0 && at < ids.length) focusCard(ids[at]);
  }

  /** Do what a key asks for; true if it was one of ours. */
  function key(event) {
    if (single) return false;
    const focus = document.activeElement;
    const control = event.ctrlKey || event.metaKey;
    if (control && event.key === "Enter") trySubmit();
    else if (control && event.key.toLowerCase() === "z" && !focus.matches("textarea, input[type=text]")) saver.move("undo");
    else if (control || event.altKey || !around.keysOn() || focus.matches("textarea, select, input:not([type=radio])")) return false;
    else if (/^[1-9]$/.test(event.key) && Number(event.key) <= ids.length) {
      act.place(current, Number(event.key) - 1);
      goOn();
    }
    else if (["0", "Backspace", "Delete"].includes(event.key)) act.clear(current);
    else if (event.key === "x") {
      act.aside(current);
      if (draft.set_aside.includes(current)) goOn();
    }
    else if (event.key === "=") act.askSame(current);
    else if (event.key === "c") act.compare(current);
    else if (event.key === "u") saver.move("undo");
    else if (event.key === "j" || (event.key === "ArrowDown" && focus.matches(".card, body, main"))) neighbour(1);
    else if (event.key === "k" || (event.key === "ArrowUp" && focus.matches(".card, body, main"))) neighbour(-1);
    else return false;
    return true;
  }

  const stopDragging = enableDragging(main, (id, target) => {
    current = id;
    if (target.kind === "slot") act.place(id, target.slot);
    else if (target.kind === "between") move("place", { answer: id, tier: target.slot, new: true });
    else if (target.kind === "aside" && !draft.set_aside.includes(id)) act.aside(id);
    else if (target.kind === "unjudged") act.clear(id);
    showDraft();
  });
  let activeAtTick = 0;
  const ticking = setInterval(() => {
    const { active_ms: active } = around.clock.read();
    if (saver.waiting === 0 && active > 1000 && active !== activeAtTick) saver.move("tick");
    activeAtTick = active;
  }, TICK);

  showStep(Boolean(assignment.steps?.likert) && !isJudged(draft, answers));
  // moves of an earlier visit that never reached the server
  for (const { kind, body, name } of unsent(assignment.id)) saver.move(kind, body, name);
  return {
    key,
    saver,
    close() {
      clearInterval(ticking);
      stopDragging();
      saver.stop();
      document.body.classList.remove("ranks");
    },
  };
}
