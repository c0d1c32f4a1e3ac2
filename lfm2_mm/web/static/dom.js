// Small helpers over the DOM. Text goes in as text, never as markup.

/**
 * An element with attributes and children; strings become text.
 * @param {string} tag
 * @param {Record<string, any>} [attributes] `on…` adds a listener, others are set as attributes
 * @param {...(Node|string|null|undefined)} children
 * @returns {any}
 */
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, String(value));
  }
  for (const child of children) if (child != null) element.append(child);
  return element;
}

let count = 0;

/** A label and its field, tied together. */
export function labelled(text, field) {
  field.id = field.id || `field-${(count += 1)}`;
  return [make("label", { for: field.id }, text), field];
}

/** Seconds for people. */
export function seconds(value) {
  return value < 1 ? `${Math.round(value * 1000)} ms` : `${value.toFixed(2)} s`;
}

/** Fill a select with names, keeping what was chosen. */
export function choices(select, names) {
  const before = select.value;
  select.replaceChildren(...names.map((name) => make("option", { value: name }, name)));
  if (names.includes(before)) select.value = before;
}
