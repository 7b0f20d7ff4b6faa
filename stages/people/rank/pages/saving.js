// Send moves to the server one after the other. A move counts as saved when the server has answered.

import { applyMove, padded, sameDraft } from "./draft.js";
import { ask, pause, Refused, Unreachable } from "./net.js";

const KEPT = "rlhf-rank-unsent";

/** Return the moves of an assignment that an earlier visit could not send. */
export function unsent(assignment) {
  try {
    const kept = JSON.parse(localStorage.getItem(KEPT) || "null");
    return kept && kept.assignment === assignment ? kept.moves : [];
  } catch {
    return [];
  }
}

/** Return a random name for a move. */
function newName() {
  return Array.from(crypto.getRandomValues(new Uint8Array(12)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

function keep(assignment, queue) {
  try {
    const moves = queue.filter((move) => move.kind !== "tick");
    if (moves.length === 0) localStorage.removeItem(KEPT);
    else localStorage.setItem(KEPT, JSON.stringify({ assignment, moves: moves.map(({ kind, body, name }) => ({ kind, body, name })) }));
  } catch {
    // a browser without storage: the page still holds the moves as long as it is open
  }
}

/**
 * Return what keeps the draft of one assignment.
 * @param {object} options `id`, `seq`, `canUndo`, `draft`, `answers` (how many), `clock`;
 *   `onDraft(draft)` when the draft changes, `onState(state, n)` with "saved", "saving" or
 *   "waiting" and how many moves are unsent, `onElsewhere()` when another window changed the task,
 *   `onRefused(error)` when the server refuses a move
 */
export function makeSaver(options) {
  const { id, answers, clock, onDraft, onState, onElsewhere, onRefused } = options;
  let { seq, canUndo } = options;
  let draft = padded(options.draft, answers);
  const queue = []; // {kind, body, name, after}: `after` is the draft that the move is meant to give
  let sending = null;
  let stopped = false;

  function show(next) {
    draft = next;
    onDraft(draft);
  }

  /** Put waiting moves on top of what the server has now. */
  function rebase(serverDraft) {
    let next = padded(serverDraft, answers);
    for (const move of queue) {
      if (move.kind !== "undo") next = applyMove(next, move.kind, move.body);
      move.after = next;
    }
    show(next);
  }

  function accept(answer) {
    seq = answer.seq;
    canUndo = answer.can_undo;
    const move = queue.shift();
    keep(id, queue);
    if (move.kind !== "tick" && !sameDraft(padded(answer.draft, answers), move.after)) rebase(answer.draft);
    else if (queue.length === 0 && !sameDraft(padded(answer.draft, answers), draft)) rebase(answer.draft);
  }

  async function sendFirst() {
    const move = queue[0];
    move.times ??= clock.read(); // the same at each try: what came later belongs to the next move
    const { times } = move;
    // by its name the server knows a move that is sent again because the answer got lost
    const body = { seq, kind: move.kind, body: move.body, id: move.name, ...times };
    try {
      const answer = await ask("POST", `/api/assignments/${id}/moves`, body);
      clock.spend(times);
      accept(answer);
    } catch (error) {
      if (!(error instanceof Refused) || error.status !== 409 || error.body.draft === undefined) throw error;
      if (error.body.seq === seq) throw error; // the task was closed in another window
      // another window made a move: this one goes on top of it; an undo would take back that one
      seq = error.body.seq;
      canUndo = error.body.can_undo;
      if (move.kind === "tick" || move.kind === "undo") queue.shift();
      keep(id, queue);
      rebase(error.body.draft);
      onElsewhere();
    }
  }

  async function sendAll() {
    let wait = 500;
    while (queue.length > 0 && !stopped) {
      onState(wait > 500 ? "waiting" : "saving", queue.length);
      try {
        await sendFirst();
        wait = 500;
      } catch (error) {
        if (error instanceof Unreachable) {
          onState("waiting", queue.length);
          await pause(wait);
          wait = Math.min(2 * wait, 5000);
          continue;
        }
        if (error instanceof Refused && (error.status === 401 || error.status === 403)) {
          stopped = true; // the moves stay in the browser and are sent at the next visit
          onRefused(error);
          return;
        }
        queue.length = 0;
        keep(id, queue);
        onRefused(error);
        return;
      }
    }
    if (!stopped) onState("saved", 0);
  }

  function start() {
    sending ??= sendAll().finally(() => {
      sending = null;
    });
    return sending;
  }

  return {
    get seq() {
      return seq;
    },
    get canUndo() {
      return canUndo || queue.some((move) => move.kind !== "tick" && move.kind !== "undo");
    },
    get waiting() {
      return queue.length;
    },
    /** Make a move: shown at once, sent in turn. */
    move(kind, body = {}, name = newName()) {
      const after = kind === "undo" || kind === "tick" ? draft : applyMove(draft, kind, body);
      queue.push({ kind, body, after, name });
      if (kind !== "tick") keep(id, queue);
      if (after !== draft) show(after);
      return start();
    },
    /** Wait until every move is saved. */
    async flush() {
      while (queue.length > 0 && !stopped) await start();
    },
    stop() {
      stopped = true;
    },
  };
}
