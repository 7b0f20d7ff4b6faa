// The smaller dialogs: skip a task, the last ten, keys, guidelines, another device.

import { button, fill, make, openDialog } from "./dom.js";
import { renderMarkdown } from "./markdown.js";
import { ask } from "./net.js";
import { snippet } from "./text.js";

const REASONS = [
  "I do not know enough about this",
  "I do not read this language well",
  "The question makes no sense",
  "It would upset me to read this",
  "It holds somebody's personal data",
];
const KEYS = [
  ["1 … 9", "give the outlined answer this place (1 is best); an equal number is a tie"],
  ["↓ or j, ↑ or k", "next answer, previous answer"],
  ["=", "as good as …: then the letter of the other answer"],
  ["x", "cannot judge this answer"],
  ["0 or Backspace", "take the answer out of its place"],
  ["c", "compare it with another one, side by side"],
  ["u or Ctrl + Z", "undo"],
  ["Ctrl + Enter", "submit the ranking"],
  ["?", "this list"],
];

/** Ask for a reason and hand it on. */
export function openSkip(onSkip) {
  const other = make("input", { type: "text", maxLength: 300, "aria-label": "Another reason", placeholder: "in your own words" });
  const choice = (text, input = null) => make("label", { class: "choice" },
    make("input", { type: "radio", name: "reason", value: text, required: true }), text, input);
  other.addEventListener("focus", () => {
    form.querySelector("input[value='']").checked = true;
  });
  const form = make("form", { method: "dialog" },
    make("p", { text: "Why can this task not be ranked? It goes to somebody else." }),
    ...REASONS.map((reason) => choice(reason)),
    make("label", { class: "choice" }, make("input", { type: "radio", name: "reason", value: "", required: true }), "Another reason:"), other,
    make("div", { class: "row" }, make("button", { type: "submit", class: "main-action", text: "Skip this task" })));
  const dialog = openDialog("Skip this task", "small", form);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const reason = new FormData(form).get("reason") || other.value.trim();
    if (!reason) {
      other.focus();
      other.setCustomValidity("Say the reason in a few words.");
      other.reportValidity();
      other.addEventListener("input", () => other.setCustomValidity(""), { once: true });
      return;
    }
    dialog.close();
    onSkip(reason);
  });
}

/**
 * Ask which answer another one is as good as; its letter chooses it, too.
 * @param {string} label the letter of the answer that gets a place
 * @param {{id: number, label: string, place: number, words: string}[]} placed what has a place
 * @param {(id: number) => void} onChoice
 */
export function openSame(label, placed, onChoice) {
  const choose = (id) => {
    dialog.close();
    onChoice(id);
  };
  const list = make("div", { class: "same" }, ...placed.map((other) => make("button", { type: "button", on: { click: () => choose(other.id) } },
    make("span", { class: "letter", text: other.label }), make("span", { class: "words", text: other.words }), make("small", { text: `place ${other.place}` }))));
  const dialog = openDialog(`Answer ${label} is as good as …`, "small", list);
  list.querySelector("button").focus();
  dialog.addEventListener("keydown", (event) => {
    const other = placed.find((one) => one.label.toLowerCase() === event.key.toLowerCase());
    if (other && !event.ctrlKey && !event.metaKey && !event.altKey) choose(other.id);
  });
}

/** Show the last ten tasks; each can be opened again. */
export async function openHistory(onReopen) {
  const list = make("div", { class: "history" }, make("p", { text: "Loading …" }));
  const dialog = openDialog("Your last ten", "small", list);
  const state = { done: "ranked", skipped: "skipped", sent_back: "sent back to you", abandoned: "not finished" };
  try {
    const { items } = await ask("GET", "/api/history?limit=10");
    if (items.length === 0) fill(list, make("p", { text: "Nothing yet: what you have ranked appears here." }));
    else {
      fill(list, make("ol", {}, ...items.map((item) => {
        const when = new Date(1000 * item.made).toLocaleString([], { dateStyle: "medium", timeStyle: "short" });
        return make("li", {}, make("div", {}, make("span", { class: "history-prompt", text: snippet(item.opening, 120) || "(empty)" }),
          make("small", { text: `${state[item.state] || item.state} · ${when}` }),
          item.message ? make("p", { class: "lead-message" }, "The lead writes: ", make("span", { class: "text", text: item.message })) : null,
        ),
        button("Open again", () => {
          dialog.close();
          onReopen(item.assignment);
        }));
      })));
    }
  } catch (error) {
    fill(list, make("p", { role: "alert", text: error.status ? error.message : "The server does not answer. Try again in a moment." }));
  }
}

/** Show which keys there are; `keys` can be switched off. */
export function openKeys(keys) {
  const box = make("input", { type: "checkbox", checked: keys.on(), on: { change: () => keys.set(box.checked) } });
  openDialog("Keys", "small",
    make("table", { class: "keys" }, make("tbody", {}, ...KEYS.map(([key, meaning]) => make("tr", {}, make("th", { scope: "row", text: key }), make("td", { text: meaning }))))),
    make("p", { text: "In the board, the arrow keys move an answer up and down." }),
    make("label", { class: "choice" }, box, "Use single keys (switch it off if they get in your way)"));
}

/** Show the guidelines. */
export function openGuidelines(markdown) {
  openDialog("Guidelines", "wide", renderMarkdown(markdown));
}

/** Show the key with which a labeler goes on in another browser. */
export function openAccount(labeler, key) {
  const shown = make("input", { readOnly: true, value: key, class: "key", "aria-label": "Your key", on: { focus: () => shown.select() } });
  openDialog("Go on in another browser", "small",
    make("p", {}, "You are ", make("b", { text: labeler.name || labeler.code }), labeler.name ? ` (code ${labeler.code}).` : "."),
    make("p", { text: "Open the address that the server printed there, choose “I have been here before” and enter your key. Keep it to yourself: who has it ranks in your name." }), shown);
}
