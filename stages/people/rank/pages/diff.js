// Compare two texts word by word (Myers 1986, the greedy algorithm).

const MOST_WORDS = 6000;
const MOST_EDITS = 1200;

/** Return a text's words, signs and stretches of white space, in order; joined, they are the text. */
export function words(text) {
  return text.match(/\s+|[\p{L}\p{N}\p{M}_]+(?:['’-][\p{L}\p{N}\p{M}_]+)*|[^\s]/gu) || [];
}

/**
 * Return which words of two lists have no partner in the other one.
 * @returns {{left: boolean[], right: boolean[]}} true: only here
 */
export function differing(left, right) {
  let start = 0;
  let end = 0;
  while (start < left.length && start < right.length && left[start] === right[start]) start += 1;
  while (
    end < left.length - start && end < right.length - start &&
    left[left.length - 1 - end] === right[right.length - 1 - end]
  ) end += 1;
  const a = left.slice(start, left.length - end);
  const b = right.slice(start, right.length - end);
  const onlyLeft = left.map((_, i) => i >= start && i < left.length - end);
  const onlyRight = right.map((_, i) => i >= start && i < right.length - end);
  for (const [i, j] of matches(a, b)) {
    onlyLeft[start + i] = false;
    onlyRight[start + j] = false;
  }
  return { left: joined(left, onlyLeft), right: joined(right, onlyRight) };
}

/** Return pairs (i, j) of equal words along a shortest edit script; none where it is too long. */
function matches(a, b) {
  if (a.length === 0 || b.length === 0 || a.length + b.length > 2 * MOST_WORDS) return [];
  const most = Math.min(a.length + b.length, MOST_EDITS);
  const offset = most + 1;
  let reach = new Int32Array(2 * most + 3); // reach[offset + k]: how far along `a` diagonal k has come
  const trace = [];
  for (let edits = 0; edits <= most; edits += 1) {
    trace.push(reach.slice());
    for (let k = -edits; k <= edits; k += 2) {
      const down = k === -edits || (k !== edits && reach[offset + k - 1] < reach[offset + k + 1]);
      let x = down ? reach[offset + k + 1] : reach[offset + k - 1] + 1;
      while (x < a.length && x - k < b.length && a[x] === b[x - k]) x += 1;
      reach[offset + k] = x;
      if (x >= a.length && x - k >= b.length) return walkBack(trace, a.length, b.length, offset);
    }
  }
  return [];
}

/** Return the pairs of equal words that a finished search passed, from the end to the start. */
function walkBack(trace, x, y, offset) {
  const pairs = [];
  for (let edits = trace.length - 1; edits >= 0; edits -= 1) {
    const reach = trace[edits];
    const k = x - y;
    const down = k === -edits || (k !== edits && reach[offset + k - 1] < reach[offset + k + 1]);
    const from = down ? k + 1 : k - 1;
    const fromX = edits === 0 ? 0 : reach[offset + from];
    const fromY = edits === 0 ? 0 : fromX - from;
    while (x > fromX && y > fromY) {
      x -= 1;
      y -= 1;
      pairs.push([x, y]);
    }
    x = fromX;
    y = fromY;
  }
  return pairs;
}

/** Mark white space between two marked words, too, so that a phrase is one mark. */
function joined(list, marks) {
  return marks.map((mark, i) => mark || (/^\s+$/.test(list[i]) && Boolean(marks[i - 1]) && Boolean(marks[i + 1])));
}
