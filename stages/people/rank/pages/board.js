// The ranking as it stands: one line a place, with the answers in it. Also where a dragged answer goes.

import { make } from "./dom.js";
import { slotOf, unjudged } from "./draft.js";
import { snippet } from "./text.js";

/**
 * Return the board and the function that shows a draft in it.
 * @param {object[]} answers in the order shown
 * @param {object} act `goTo(id)` to look at an answer, `step(id, by)` to move it up or down
 */
export function makeBoard(answers, act) {
  const slots = make("ol", { class: "slots" });
  const tray = make("div", { class: "tray", "data-tray": "unjudged" });
  const aside = make("div", { class: "tray", "data-tray": "aside" });
  const gaps = make("p", { class: "gaps", text: "An empty place does not count: only the order does." });
  const board = make("section", { class: "board", "aria-label": "Your ranking" },
    make("h2", { text: "Your ranking" }), slots, gaps, make("div", { class: "trays" }, tray, aside));

  function chip(id, draft) {
    const answer = answers.find((other) => other.id === id);
    const slot = slotOf(draft, id);
    const said = draft.set_aside.includes(id) ? "cannot judge" : slot < 0 ? "no place yet" : `place ${slot + 1}`;
    const element = make("button", {
      type: "button", class: "chip", "data-drag": id, "aria-label": `Answer ${answer.label}, ${said}`,
      title: "Drag it, move it with the arrow keys, or press it to see the answer",
    }, make("span", { class: "letter", text: answer.label }), make("span", { class: "words", text: snippet(answer.text, 34) || "(empty)" }));
    element.addEventListener("click", () => act.goTo(id));
    element.addEventListener("keydown", (event) => {
      const by = { ArrowUp: -1, ArrowLeft: -1, ArrowDown: 1, ArrowRight: 1 }[event.key];
      if (by === undefined || event.altKey || event.ctrlKey || event.metaKey) return;
      event.preventDefault();
      act.step(id, by);
    });
    return element;
  }

  function show(draft) {
    const focused = board.contains(document.activeElement) ? document.activeElement.dataset.drag : undefined;
    slots.replaceChildren(...draft.tiers.map((tier, slot) => {
      const end = slot === 0 ? "best" : slot === draft.tiers.length - 1 ? "worst" : "";
      return make("li", { class: tier.length ? "slot" : "slot empty", "data-slot": slot },
        make("span", { class: "slot-name" }, make("b", { text: String(slot + 1) }), end ? make("small", { text: end }) : null),
        make("span", { class: "chips" }, ...tier.map((id) => chip(id, draft)),
          tier.length > 1 ? make("span", { class: "tie", text: "equally good" }) : null));
    }));
    const left = unjudged(draft, answers.map((answer) => answer.id));
    tray.replaceChildren(make("span", { class: "tray-name", text: left.length ? "No place yet" : "Every answer has been judged" }),
      ...left.map((id) => chip(id, draft)));
    aside.replaceChildren(make("span", { class: "tray-name", text: "Cannot judge" }), ...draft.set_aside.map((id) => chip(id, draft)));
    aside.classList.toggle("empty", draft.set_aside.length === 0);
    const last = draft.tiers.findLastIndex((tier) => tier.length > 0);
    gaps.hidden = !draft.tiers.slice(0, Math.max(last, 0)).some((tier) => tier.length === 0);
    if (focused !== undefined) board.querySelector(`[data-drag="${CSS.escape(focused)}"]`)?.focus({ preventScroll: true });
  }
  return { board, show };
}
