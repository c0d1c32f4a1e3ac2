// In which order the turns of a conversation stand: where its items do, not as news of them comes.

/**
 * The place of a new turn among those that are shown.
 * @param {{id: string, who: string}[]} turns as they stand, oldest first
 * @param {string} who "you" or "model"
 * @param {string|null|undefined} after id of the item behind which it stands; one that is not
 *   shown, or none, is the end
 * @returns {number}
 */
export function place(turns, who, after) {
  const before = after == null ? -1 : turns.findIndex((turn) => turn.id === after);
  if (before < 0) return turns.length;
  let at = before + 1;
  // an answer of which nothing was heard is behind no item, but stays with its question
  if (who === "you") while (at < turns.length && turns[at].who === "model") at += 1;
  return at;
}
