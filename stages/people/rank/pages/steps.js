// The first step, where it is asked for: each answer alone, on a scale from 1 to 7, with yes/no questions.

import { button, fill, make, say } from "./dom.js";
import { textBlock } from "./text.js";

const ENDS = { 1: "very bad", 4: "so-so", 7: "excellent" };

/** Tell whether every answer has its number. */
export function isJudged(draft, answers) {
  return answers.every((answer) => (draft.likert[answer.id]?.overall ?? null) !== null);
}

/**
 * Return the step and the function that shows a draft in it.
 * @param {object[]} answers in the order shown
 * @param {{name: string, question: string}[]} flags
 * @param {object} act `likert(id, overall)`, `flag(id, name, value)`, `draft()`, `done()`
 */
export function makeSingleStep(answers, flags, act) {
  const start = answers.findIndex((answer) => (act.draft().likert[answer.id]?.overall ?? null) === null);
  let at = Math.max(start, 0);
  const root = make("section", { class: "single", "aria-label": "Judge each answer alone" });

  function scale(answer) {
    const row = make("fieldset", { class: "places scale" }, make("legend", { text: "How good is this answer?" }));
    for (let value = 1; value <= 7; value += 1) {
      const input = make("input", { type: "radio", name: `likert-${answer.id}`, value: String(value), on: { change: () => act.likert(answer.id, value) } });
      row.append(make("label", { class: "place" }, input, make("span", { class: "number", text: String(value) }), ENDS[value] ? make("small", { text: ENDS[value] }) : null));
    }
    return row;
  }

  function questions(answer) {
    if (flags.length === 0) return null;
    return make("fieldset", { class: "flags" }, make("legend", { text: "Tick what is true of it" }),
      ...flags.map((flag) => {
        const input = make("input", { type: "checkbox", name: flag.name, on: { change: () => act.flag(answer.id, flag.name, input.checked) } });
        return make("label", { class: "choice" }, input, flag.question);
      }));
  }

  function go(to) {
    if (to >= answers.length) {
      if (isJudged(act.draft(), answers)) {
        act.done();
        return;
      }
      at = answers.findIndex((answer) => (act.draft().likert[answer.id]?.overall ?? null) === null);
      say("An answer has no number yet.");
    } else at = to;
    draw();
    root.querySelector("h2").focus();
  }

  function draw() {
    const answer = answers[at];
    const last = at === answers.length - 1;
    fill(root,
      make("h2", { tabIndex: -1, text: `Step 1 of 2: answer ${answer.label} alone (${at + 1} of ${answers.length})` }),
      make("article", { class: "card", "data-answer": answer.id }, textBlock(answer.text, `answer ${answer.label}`), scale(answer), questions(answer)),
      make("div", { class: "row" },
        at > 0 ? button("Back", () => go(at - 1)) : null,
        button(last ? "Go to the ranking" : "Next answer", () => go(at + 1), { class: "main-action next-answer" })));
    show(act.draft());
  }

  function show(draft) {
    const judged = draft.likert[answers[at].id] || { overall: null, flags: {} };
    for (const input of root.querySelectorAll("input[type=radio]")) input.checked = Number(input.value) === judged.overall;
    for (const input of root.querySelectorAll("input[type=checkbox]")) input.checked = Boolean(judged.flags?.[input.name]);
    root.querySelector(".next-answer").disabled = (judged.overall ?? null) === null;
  }

  draw();
  return { root, show };
}
