// What each move does to a draft: pure functions, the same that the server computes.

/** Return a draft whose tiers are K lists. */
export function padded(draft, answers) {
  const tiers = (draft.tiers || []).map((tier) => [...tier]);
  while (tiers.length < answers) tiers.push([]);
  return {
    tiers,
    set_aside: [...(draft.set_aside || [])],
    likert: structuredClone(draft.likert || {}),
    confidence: draft.confidence ?? null,
    note: draft.note || "",
  };
}

/** Return the slot of an answer, from 0; -1 if it has none. */
export function slotOf(draft, answer) {
  return draft.tiers.findIndex((tier) => tier.includes(answer));
}

/** Return the answers that have neither a slot nor been set aside. */
export function unjudged(draft, answers) {
  return answers.filter((answer) => slotOf(draft, answer) < 0 && !draft.set_aside.includes(answer));
}

function without(draft, answer) {
  draft.tiers = draft.tiers.map((tier) => tier.filter((other) => other !== answer));
  draft.set_aside = draft.set_aside.filter((other) => other !== answer);
}

/** Insert a slot for one answer; the next empty one behind it makes room, or the last in front. */
function insertSlot(draft, answer, slot) {
  const tiers = [...draft.tiers.slice(0, slot), [answer], ...draft.tiers.slice(slot)];
  const behind = tiers.findIndex((other, i) => i > slot && other.length === 0);
  const spare = behind >= 0 ? behind : tiers.slice(0, slot).findLastIndex((other) => other.length === 0);
  draft.tiers = tiers.filter((_, i) => i !== spare);
}

/**
 * Return the draft after a move; undo is the server's alone.
 * @param {object} before
 * @param {string} kind
 * @param {object} body its `tier` is a slot, from 0
 */
export function applyMove(before, kind, body) {
  const draft = structuredClone(before);
  const own = draft.likert[body.answer] || { overall: null, flags: {} };
  if (kind === "place") {
    without(draft, body.answer);
    if (body.tier !== null && body.new) insertSlot(draft, body.answer, body.tier);
    else if (body.tier !== null) draft.tiers[body.tier].push(body.answer);
  } else if (kind === "same") {
    without(draft, body.answer);
    draft.tiers[slotOf(draft, body.as)].push(body.answer);
  } else if (kind === "aside") {
    without(draft, body.answer);
    draft.set_aside.push(body.answer);
  } else if (kind === "unaside") without(draft, body.answer);
  else if (kind === "likert") draft.likert[body.answer] = { ...own, overall: body.overall };
  else if (kind === "flag") draft.likert[body.answer] = { ...own, flags: { ...own.flags, [body.flag]: body.value } };
  else if (kind === "confidence") draft.confidence = body.value;
  else if (kind === "note") draft.note = body.text;
  return draft;
}

/** Tell whether two drafts say the same; the order within a slot and unset flags mean nothing. */
export function sameDraft(one, other) {
  return canonical(one) === canonical(other);
}

function canonical(draft) {
  const likert = Object.entries(draft.likert || {}).map(([answer, judged]) => [
    answer, judged.overall ?? null,
    Object.entries(judged.flags || {}).filter(([, value]) => value).map(([name]) => name).sort(),
  ]).filter(([, overall, flags]) => overall !== null || flags.length > 0).sort();
  const tiers = (draft.tiers || []).map((tier) => [...tier].sort());
  while (tiers.length && tiers.at(-1).length === 0) tiers.pop();
  return JSON.stringify([tiers, [...(draft.set_aside || [])].sort(), likert, draft.confidence ?? null, draft.note || ""]);
}
