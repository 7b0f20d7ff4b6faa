// One answer on the page: its text, its place, and what can be done with it.

import { button, make } from "./dom.js";
import { slotOf } from "./draft.js";
import { textBlock } from "./text.js";

/** Return what a screen reader and the card say about an answer's place. */
export function describePlace(draft, answer, answers) {
  if (draft.set_aside.includes(answer.id)) return "cannot judge";
  const slot = slotOf(draft, answer.id);
  if (slot < 0) return "no place yet";
  const others = draft.tiers[slot].filter((id) => id !== answer.id)
    .map((id) => answers.find((other) => other.id === id).label).sort();
  const place = `place ${slot + 1}`;
  return others.length === 0 ? place : `${place}, same as ${others.join(" and ")}`;
}

/**
 * Return the row of numbers that gives an answer its place: radio buttons.
 * @param {string} group a name of its own for each row
 * @param {(slot: number) => void} onPlace told the chosen slot, from 0
 */
export function placeRow(answer, answers, group, onPlace) {
  const row = make("fieldset", { class: "places" },
    make("legend", {}, "Place", make("span", { class: "only-read", text: ` of answer ${answer.label}` })));
  answers.forEach((_, slot) => {
    const end = slot === 0 ? "best" : slot === answers.length - 1 ? "worst" : "";
    const input = make("input", { type: "radio", name: group, value: String(slot), on: { change: () => onPlace(slot) } });
    row.append(make("label", { class: "place" }, input, make("span", { class: "number", text: String(slot + 1) }),
      end ? make("small", { text: end }) : null));
  });
  return row;
}

/** Tick in a row of places what the draft has. */
export function showPlace(row, draft, answer) {
  const slot = slotOf(draft, answer.id);
  for (const input of row.querySelectorAll("input")) input.checked = Number(input.value) === slot;
}

/**
 * Return a card and the function that shows a draft in it.
 * @param {object} answer `{id, label, text, finished}`
 * @param {object[]} answers all answers of the task, in the order shown
 * @param {object} act `place(id, slot)`, `askSame(id)`, `aside(id)`, `clear(id)`, `compare(id)`,
 *   `focus(id)`
 */
export function makeCard(answer, answers, act) {
  const name = `answer ${answer.label}`;
  const tag = make("span", { class: "state" });
  const grip = make("span", { class: "grip", "data-drag": answer.id, title: `Drag ${name} to its place`, "aria-hidden": "true" },
    make("span", { class: "dots", text: "⠿" }), make("span", { class: "letter", text: answer.label }));
  const head = make("div", { class: "card-head", "data-drag": answer.id }, grip,
    make("h3", { id: `name-${answer.id}`, text: `Answer ${answer.label}` }), tag,
    answer.finished === false ? make("span", { class: "cut-off", title: "It reached the limit of its length.", text: "cut off" }) : null);
  const row = placeRow(answer, answers, `place-${answer.id}`, (slot) => act.place(answer.id, slot));
  const same = button("Same as …", () => act.askSame(answer.id));
  const aside = button("Cannot judge", () => act.aside(answer.id), { "aria-pressed": "false" });
  const clear = button("Take out", () => act.clear(answer.id), { class: "quiet" });
  const compare = button("Compare", () => act.compare(answer.id), { class: "quiet" });
  for (const control of [same, aside, clear, compare]) {
    control.append(make("span", { class: "only-read", text: ` ${name}` }));
  }
  const card = make("article", { class: "card", tabIndex: -1, id: `card-${answer.id}`, "data-answer": answer.id, "aria-labelledby": `name-${answer.id}` },
    head, textBlock(answer.text, name),
    make("div", { class: "controls" }, row, make("div", { class: "more-controls" }, same, aside, compare, clear)));
  card.addEventListener("focusin", () => act.focus(answer.id));
  card.addEventListener("pointerdown", () => act.focus(answer.id));

  function show(draft, current) {
    const slot = slotOf(draft, answer.id);
    const isAside = draft.set_aside.includes(answer.id);
    tag.textContent = describePlace(draft, answer, answers);
    tag.classList.toggle("done", slot >= 0 || isAside);
    card.classList.toggle("current", current === answer.id);
    card.classList.toggle("set-aside", isAside);
    showPlace(row, draft, answer);
    aside.setAttribute("aria-pressed", String(isAside));
    clear.hidden = slot < 0 && !isAside;
    same.disabled = !answers.some((other) => other.id !== answer.id && slotOf(draft, other.id) >= 0);
  }
  return { card, show };
}
