// What explorers are made of beside drawings: elements, words, tables, toolbars and forms.
export function element(tag, attributes = {}, ...inner) {
  const made = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (value !== false && value != null) made.setAttribute(key, value === true ? "" : value);
  }
  const plain = ["option", "pre", "code"].includes(tag);
  made.append(...inner.filter((each) => each != null).flatMap((each) => (plain ? each : worded(each))));
  return made;
}

export const button = (words, onclick, more = {}) =>
  element("button", { type: "button", ...more, onclick }, words);

// One of the pictures that lie side by side in a sprite, `side` pixels high.
export function picture(sprite, n, side, truth) {
  const style = `background: #fff url(${sprite}) -${n * side}px 0 / auto ${side}px`;
  return element("span", { class: "picture", role: "img", "aria-label": `A picture of ${truth}`, title: truth, style });
}

// The places of an explorer by name; what is said and warned of is read aloud.
export function places(el, names) {
  const place = Object.fromEntries(names.map((name) => [name, element("div", { class: name })]));
  place.said.setAttribute("aria-live", "polite");
  place.warned?.setAttribute("role", "status");
  el.classList.add("explorer");
  return place;
}

// A function that calls `update` in the next frame, once for all its calls until then.
export function perFrame(update) {
  let waiting = 0;
  return () => {
    waiting ||= requestAnimationFrame(() => {
      waiting = 0;
      update();
    });
  };
}

// A function that calls `update` once its own calls have stopped for some milliseconds.
export function atRest(update, wait = 150) {
  let waiting = 0;
  return () => {
    clearTimeout(waiting);
    waiting = setTimeout(update, wait);
  };
}

// The index of A_KA and A_ZS is set low in a text, where it is copied with its "_".
export const INDEX = /_(KA|ZS)\b/;
const low = (part) => [element("span", { class: "hidden" }, "_"), element("sub", {}, part)];
const worded = (text) =>
  text.nodeType ? [text] : String(text).split(INDEX).flatMap((part, n) => (n % 2 ? low(part) : part));
export const say = (place, text) => {
  if (place.dataset.words === text) return;
  place.dataset.words = text;
  place.replaceChildren(...worded(text));
};

export const short = (value, digits = 3) => String(Number(Number(value).toPrecision(digits)));
export const percent = (share) => `${short(100 * share)}%`;
export const points = (value) => value.toFixed(1).replace("-", "−");
export const signed = (value) => (value > 0 ? "+" : "") + points(value);
// A setting's score with half its interval, where there is one.
export const score = ({ at, half }, axis) => points(at[axis]) + (half ? ` ± ${points(half[axis])}` : "");

// One stop of the Tab key for many elements: arrow keys lead from one to the next. Elements that are set
// by the keys of one direction are led through by the other, `keys`.
export const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] };
export function roving(place, selector, keys = ["ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown"]) {
  const all = () => [...place.querySelectorAll(selector)].filter((each) => !each.disabled);
  const choose = (chosen) => all().forEach((each) => each.setAttribute("tabindex", each === chosen ? 0 : -1));
  if (!place.dataset.roving) {
    place.dataset.roving = "";
    place.addEventListener("focusin", ({ target }) => target.matches(selector) && choose(target));
    place.addEventListener("keydown", (event) => {
      const [found, way] = [all(), ARROWS[event.key]];
      const at = found.indexOf(event.target);
      if (!way || at < 0 || !keys.includes(event.key)) return;
      event.preventDefault();
      event.stopPropagation();
      found.at((at + way[0] - way[1] + found.length) % found.length).focus();
    });
  }
  const found = all();
  if (found.filter((each) => each.tabIndex === 0).length !== 1) choose(found[0]);
}

export function toolbar(label, ...inner) {
  const made = element("div", { class: "tools", role: "toolbar", "aria-label": label }, ...inner);
  roving(made, "button", ["ArrowLeft", "ArrowRight"]);
  return made;
}

// Copy the text of an element, and return what the button then says. A page over plain HTTP has no clipboard,
// and a browser may refuse it.
export async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text.textContent);
    return "Copied";
  } catch {
    getSelection().selectAllChildren(text);
    return document.execCommand("copy") ? "Copied" : "Press Ctrl+C";
  }
}

// A column of numbers stands at the right.
const NUMBER = /^([+−]?[\d,.]+( ± [\d.]+)?|–|…)$/;
export function table(head, rows) {
  const numeric = head.map((_, k) => rows.every((cells) => NUMBER.test(cells[k])));
  const row = (cells, tag) =>
    element("tr", {}, ...cells.map((cell, k) => element(cell === "" ? "td" : tag, { class: numeric[k] && "figure" }, cell)));
  const body = element("tbody", {}, ...rows.map((cells) => row(cells, "td")));
  return element("div", { class: "wide", tabindex: 0 }, element("table", {}, element("thead", {}, row(head, "th")), body));
}

// Fields of a form. Each is {key, label, options} or {key, label, range: [low, high], step, log, percent,
// whole}, `long` where it takes two places of the grid, and `off` where it does not matter for a state:
// it stays in its place, so that nothing below it jumps.
export function form(place, change, warn) {
  let drawn = "";
  const shown = new Map();

  function choice({ key, label, options }) {
    const select = element("select", { oninput: () => change({ [key]: JSON.parse(select.value) }) });
    for (const each of options) {
      const [value, words] = Array.isArray(each) ? each : [each, each];
      select.append(element("option", { value: JSON.stringify(value) }, String(words)));
    }
    shown.set(key, (value) => (select.value = JSON.stringify(value)));
    return element("label", {}, element("span", {}, label), select);
  }

  function check({ key, label }) {
    const box = element("input", { type: "checkbox", oninput: () => change({ [key]: box.checked }) });
    shown.set(key, (value) => (box.checked = value));
    return element("label", { class: "check" }, box, element("span", {}, label));
  }

  // With `percent`, a share is shown and typed as per cent: 30, or 30%, is 0.3.
  function number(field) {
    const { key, label, range: [low, high], step, log } = field;
    const format = (value) => (field.percent ? percent(value) : field.whole ? String(value) : short(value));
    let current = low;
    const [to, from] = log ? [Math.log10, (x) => 10 ** x] : [Number, Number];
    const set = (value) => change({ [key]: tidy(field, value) });
    const slider = element("input", {
      type: "range",
      min: to(low),
      max: to(high),
      step: step ?? 0.01,
      "aria-label": label,
      oninput: () => set(from(Number(slider.value))),
    });
    const typed = element("input", { type: "text", inputmode: "decimal", "aria-label": `${label}, as a number`, onchange: commit });
    typed.addEventListener("keydown", (event) => {
      if (event.key !== "Enter") return;
      event.preventDefault();
      typed.dispatchEvent(new Event("change", { bubbles: true }));
    });
    let isTyping = false;
    typed.addEventListener("input", () => (isTyping = true));
    typed.addEventListener("blur", () => ((isTyping = false), (typed.value = format(current)))); // after a change
    function commit() {
      isTyping = false;
      if (typed.value === format(current)) return; // as after Enter, when the field is left
      const words = typed.value.replace(field.percent ? /[%\s]/g : /\s/g, "").replaceAll(",", field.whole ? "" : ".");
      const asked = Number(words) / (field.percent ? 100 : 1);
      const known = words !== "" && Number.isFinite(asked);
      const value = known ? tidy(field, asked) : current;
      const became = `${typed.value || "nothing"} became ${format(value)}`;
      typed.value = format(value);
      slider.value = to(value); // at once: its next key may come before the next frame
      change({ [key]: value }); // an explorer may settle on another value, and draw that
      if (!known || asked < low || asked > high)
        warn(`${label}: ${became}; it goes from ${format(low)} to ${format(high)}.`);
      else if (format(value) !== format(asked)) warn(`${label}: ${became}, the nearest that can be set here.`);
    }
    shown.set(key, (value) => {
      current = value;
      // a slider stays where it is if that rounds to the value, so that keys can move it on in small steps
      if (tidy(field, from(Number(slider.value))) !== value) slider.value = to(value);
      slider.setAttribute("aria-valuetext", format(value));
      if (isTyping || typed.value === format(value)) return;
      typed.value = format(value);
      if (typed.matches(":focus")) typed.select(); // as it was when Tab led here, before this drawing
    });
    return element("div", { class: "number" }, element("span", {}, label), slider, typed);
  }

  return (fields, state) => {
    const signature = JSON.stringify(fields.map((field) => ({ ...field, off: false })));
    if (signature !== drawn) {
      const focused = place.querySelector(":focus")?.closest("[data-key]")?.dataset.key;
      shown.clear();
      place.replaceChildren(
        ...fields.map((field) => {
          const made = field.options ? choice(field) : field.range ? number(field) : check(field);
          made.dataset.key = field.key;
          made.classList.toggle("long", Boolean(field.long));
          return made;
        }),
      );
      drawn = signature;
      if (focused) place.querySelector(`[data-key="${focused}"] :is(input, select)`)?.focus();
    }
    for (const { key, off = false } of fields) {
      shown.get(key)(state[key]);
      const made = place.querySelector(`[data-key="${key}"]`);
      if (made.classList.contains("off") === off) continue;
      made.classList.toggle("off", off);
      for (const input of made.querySelectorAll("input, select")) input.disabled = off;
    }
  };
}

// The nearest value that a field can have. 1 - 33 / 40 is 0.17500000000000004, hence the digits.
export function tidy({ range: [low, high], step, log, whole }, value) {
  const near = whole || !log ? Math.round(value / (whole ? 1 : step)) * (whole ? 1 : step) : Number(value.toPrecision(3));
  return Number(Math.min(high, Math.max(low, near)).toPrecision(8));
}

// What a window remembers until it is closed; nothing where a browser blocks storage.
export function recalled(key) {
  try {
    return sessionStorage.getItem(key);
  } catch {
    return null;
  }
}
export function remember(key, text) {
  try {
    sessionStorage.setItem(key, text);
  } catch {} // blocked, or full
}
