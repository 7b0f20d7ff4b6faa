// Two answers side by side, their differences marked.

import { placeRow, showPlace } from "./card.js";
import { differing, words } from "./diff.js";
import { make, openDialog } from "./dom.js";
import { appendText } from "./text.js";

const MOST = 20_000; // characters of an answer that are compared

/** Append a text's words, those that are only here as marks. */
function appendMarked(parent, list, only) {
  for (let i = 0; i < list.length;) {
    let end = i;
    while (end < list.length && only[end] === only[i]) end += 1;
    const part = only[i] ? make("mark") : make("span");
    appendText(part, list.slice(i, end).join(""));
    parent.append(part);
    i = end;
  }
}

function share(list, only) {
  const counted = list.map((word, i) => [word, only[i]]).filter(([word]) => word.trim() !== "");
  return counted.length === 0 ? 1 : counted.filter(([, isOnly]) => !isOnly).length / counted.length;
}

/**
 * Open the comparison.
 * @param {object[]} answers in the order shown
 * @param {number} first the answer on the left
 * @param {number} second the answer on the right
 * @param {object} act `place(id, slot)` and `draft()`
 * @returns {() => void} shows a changed draft in it
 */
export function openComparison(answers, first, second, act) {
  const chosen = [first, second];
  const columns = [make("section", { class: "side" }), make("section", { class: "side" })];
  const summary = make("p", { class: "soft", role: "status" });
  let rows = [];
  openDialog("Two answers side by side", "compare", summary, make("div", { class: "sides" }, ...columns));

  function column(side) {
    const answer = answers.find((other) => other.id === chosen[side]);
    const select = make("select", { "aria-label": side === 0 ? "Left answer" : "Right answer" },
      ...answers.map((other) => make("option", { value: String(other.id), text: `Answer ${other.label}`, disabled: other.id === chosen[1 - side] })));
    select.value = String(answer.id);
    select.addEventListener("change", () => {
      chosen[side] = Number(select.value);
      draw();
      columns[side].querySelector("select").focus();
    });
    const row = placeRow(answer, answers, `compare-${side}`, (slot) => act.place(answer.id, slot));
    return { answer, select, row };
  }

  function draw() {
    rows = [column(0), column(1)];
    const lists = rows.map(({ answer }) => words(answer.text.replace(/\r\n?/g, "\n").slice(0, MOST)));
    const only = differing(...lists);
    rows.forEach(({ answer, select, row }, side) => {
      const body = make("div", { class: "text" });
      appendMarked(body, lists[side], side === 0 ? only.left : only.right);
      columns[side].replaceChildren(make("div", { class: "side-head" }, select, row), body);
      if (answer.text.length > MOST) {
        columns[side].append(make("p", { class: "soft", text: `Compared: the first ${MOST.toLocaleString("en")} characters.` }));
      }
    });
    const common = Math.round(50 * (share(lists[0], only.left) + share(lists[1], only.right)));
    const equal = !only.left.includes(true) && !only.right.includes(true);
    summary.textContent = equal ? "No differences." : `${common} % of the words are the same. Marked: what only this answer has.`;
    show();
  }

  function show() {
    for (const { answer, row } of rows) showPlace(row, act.draft(), answer);
  }

  draw();
  return show;
}
