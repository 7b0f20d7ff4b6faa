// Drag an answer to its place, by mouse, pen or finger (pointer events).

import { make } from "./dom.js";

const SLACK = 6; // pixels that a press may move and still be a press
const EDGE = 60; // pixels from the window's edge where dragging scrolls

/**
 * Return what lies under a point: where a drop would put the answer.
 * @returns {{kind: "slot"|"between"|"unjudged"|"aside", slot?: number, element: Element}|null}
 */
function targetAt(x, y) {
  const under = document.elementFromPoint(x, y);
  const tray = under?.closest("[data-tray]");
  if (tray) return { kind: tray.dataset.tray, element: tray };
  const line = under?.closest("[data-slot]");
  if (!line) return null;
  const slot = Number(line.dataset.slot);
  if (line.classList.contains("empty")) return { kind: "slot", slot, element: line };
  // near its edge an occupied line means "between": a place of its own there
  const box = line.getBoundingClientRect();
  const across = getComputedStyle(line.parentElement).flexDirection === "row";
  const along = across ? (x - box.left) / box.width : (y - box.top) / box.height;
  if (along < 0.25) return { kind: "between", slot, element: line };
  if (along > 0.75) return { kind: "between", slot: slot + 1, element: line };
  return { kind: "slot", slot, element: line };
}

function mark(target) {
  for (const element of document.querySelectorAll(".drop, .drop-before, .drop-after")) {
    element.classList.remove("drop", "drop-before", "drop-after");
  }
  if (!target) return;
  const before = target.kind === "between" && target.slot === Number(target.element.dataset.slot);
  target.element.classList.add(target.kind !== "between" ? "drop" : before ? "drop-before" : "drop-after");
}

/**
 * Let everything with `data-drag` (an answer's id) be dragged.
 * @param {Element} root
 * @param {(id: number, target: object) => void} onDrop
 * @returns {() => void} ends it
 */
export function enableDragging(root, onDrop) {
  let held = null; // {id, pointer, x, y, ghost, target}
  let frame = 0;

  function scrollAtEdge() {
    if (!held?.ghost) return;
    const bottom = innerHeight - (document.querySelector(".board")?.getBoundingClientRect().height ?? 0);
    const edge = matchMedia("(max-width: 60rem)").matches ? bottom : innerHeight;
    if (held.y < EDGE) scrollBy(0, -12);
    else if (held.y > edge - EDGE && held.y < edge) scrollBy(0, 12);
    frame = requestAnimationFrame(scrollAtEdge);
  }

  function end() {
    held?.ghost?.remove();
    held = null;
    cancelAnimationFrame(frame);
    mark(null);
    document.body.classList.remove("dragging");
  }

  function down(event) {
    const handle = event.target.closest("[data-drag]");
    if (!handle || !event.isPrimary || event.button !== 0) return;
    // a finger scrolls the page on a card's head; it drags by the grip
    if (event.pointerType === "touch" && !event.target.closest(".grip, .chip")) return;
    held = { id: Number(handle.dataset.drag), pointer: event.pointerId, x: event.clientX, y: event.clientY, ghost: null, target: null };
  }

  function move(event) {
    if (!held || event.pointerId !== held.pointer) return;
    if (!held.ghost) {
      if (Math.hypot(event.clientX - held.x, event.clientY - held.y) < SLACK) return;
      const letter = root.querySelector(`#card-${held.id} .letter`).textContent;
      held.ghost = make("div", { class: "ghost", "aria-hidden": "true" }, make("span", { class: "letter", text: letter }));
      document.body.append(held.ghost);
      document.body.classList.add("dragging");
      getSelection()?.removeAllRanges();
      frame = requestAnimationFrame(scrollAtEdge);
    }
    event.preventDefault();
    held.x = event.clientX;
    held.y = event.clientY;
    held.ghost.style.transform = `translate(${held.x}px, ${held.y}px)`;
    held.target = targetAt(held.x, held.y);
    mark(held.target);
  }

  function up(event) {
    if (!held || event.pointerId !== held.pointer) return;
    const { id, ghost, target } = held;
    end();
    if (!ghost) return;
    // the press that ended the drag is no click
    addEventListener("click", stopEvent, { capture: true, once: true });
    setTimeout(() => removeEventListener("click", stopEvent, { capture: true }), 0);
    if (target) onDrop(id, target);
  }

  function stopEvent(event) {
    event.preventDefault();
    event.stopPropagation();
  }

  function key(event) {
    if (event.key === "Escape" && held) end();
  }

  /** Keep a finger that drags from also being a swipe, whose end would swallow the next tap. */
  function touchMove(event) {
    if (held && event.cancelable) event.preventDefault();
  }

  root.addEventListener("pointerdown", down);
  root.addEventListener("touchmove", touchMove, { passive: false });
  addEventListener("pointermove", move, { passive: false });
  addEventListener("pointerup", up);
  addEventListener("pointercancel", end);
  addEventListener("keydown", key);
  root.addEventListener("dragstart", stopEvent);
  return () => {
    end();
    root.removeEventListener("pointerdown", down);
    root.removeEventListener("touchmove", touchMove);
    root.removeEventListener("dragstart", stopEvent);
    removeEventListener("pointermove", move);
    removeEventListener("pointerup", up);
    removeEventListener("pointercancel", end);
    removeEventListener("keydown", key);
  };
}
