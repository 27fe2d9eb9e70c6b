// What a page does in the browser: dark or light, the menu, search, copying, tabs, the outline.
const root = document.documentElement;
root.classList.add("scripted");

// Dark or light: the system's choice until the reader makes one.
document.querySelector("button.theme").addEventListener("click", () => {
  const dark = root.dataset.theme
    ? root.dataset.theme === "dark"
    : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
  try {
    localStorage.setItem("theme", root.dataset.theme);
  } catch {
    // no storage: the choice holds for this page
  }
});

// The menu of chapters, on a narrow screen.
const menu = document.querySelector("button.menu");
const chapters = document.querySelector(".chapters");
function open(shown) {
  chapters.classList.toggle("open", shown);
  menu.setAttribute("aria-expanded", shown);
  if (shown) chapters.querySelector("a").focus();
}
menu.addEventListener("click", () => open(!chapters.classList.contains("open")));
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && chapters.classList.contains("open")) {
    open(false);
    menu.focus();
  }
});

// Search: every word must begin a word of the record; titles first.
const field = document.querySelector(".search input");
const list = document.querySelector(".found");
const status = document.querySelector(".none");
const MOST = 12;
let records;

async function index() {
  records ??= fetch(field.dataset.index)
    .then((answer) => answer.json())
    .then((found) => found.records);
  return records;
}

const escaped = (text) =>
  text.replace(/[&<>"]/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" })[c]);
const pattern = (word) =>
  new RegExp(`(^|[^\\p{L}\\p{N}])(${word.replace(/[.*+?^${}()|[\]\\]/g, "\\$&")})`, "iu");

function hit(record, words) {
  const titles = Object.values(record.hierarchy).filter((title) => title);
  const text = record.content ?? "";
  const all = `${titles.join(" ")} ${text}`;
  if (!words.every((word) => word.test(all))) return null;
  return { record, titles, text, score: words.filter((word) => word.test(titles.at(-1))).length };
}

function excerpt(text, words) {
  const at = Math.max(0, text.search(words[0]) - 40);
  const cut = `${at ? "…" : ""}${text.slice(at, at + 130)}${text.length > at + 130 ? "…" : ""}`;
  return words.reduce((marked, word) => marked.replace(word, "$1<mark>$2</mark>"), escaped(cut));
}

async function search() {
  const words = field.value
    .trim()
    .split(/\s+/)
    .filter((word) => word)
    .map(pattern);
  if (!words.length) return close();
  const found = (await index()).map((record) => hit(record, words)).filter((each) => each);
  const pages = new Set();
  const shown = found
    .sort((one, other) => other.score - one.score)
    .filter(({ record }) => !pages.has(record.url) && pages.add(record.url))
    .slice(0, MOST);
  list.innerHTML = shown
    .map(({ record, titles, text }) => {
      const place = escaped([...new Set([titles[0], titles.at(-1)])].join(" › "));
      return `<li><a href="${field.dataset.base}${record.url}"><b>${place}</b>${excerpt(text, words)}</a></li>`;
    })
    .join("");
  list.hidden = !shown.length;
  status.textContent = shown.length ? "" : "Nothing found";
}

function close() {
  list.hidden = true;
  status.textContent = "";
}

field.addEventListener("focus", index, { once: true });
field.addEventListener("input", search);
document.addEventListener("keydown", (event) => {
  const typing = event.target.matches?.("input, select, textarea, [role=slider]");
  if (event.key === "/" && !typing) {
    event.preventDefault();
    field.focus();
  }
});
document.querySelector(".search").addEventListener("keydown", (event) => {
  const links = [...list.querySelectorAll("a")];
  const at = links.indexOf(document.activeElement);
  const to = { ArrowDown: at + 1, ArrowUp: at - 1 }[event.key];
  if (event.key === "Escape") {
    field.value = "";
    close();
    field.focus();
  } else if (event.key === "Enter" && event.target === field && links.length && !list.hidden) {
    links[0].click();
  } else if (to !== undefined && links.length && !list.hidden) {
    event.preventDefault();
    (links[to] ?? field).focus();
  }
});
document.addEventListener("click", (event) => {
  if (!event.target.closest(".search")) close();
});

// Copying code.
for (const code of document.querySelectorAll(".code")) {
  const button = Object.assign(document.createElement("button"), {
    className: "copy",
    type: "button",
    textContent: "Copy",
  });
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(code.querySelector("pre").textContent);
    button.textContent = "Copied";
    setTimeout(() => (button.textContent = "Copy"), 1500);
  });
  code.append(button);
}

// Tabs, by mouse and by arrow keys.
for (const tabs of document.querySelectorAll(".tabs")) {
  const buttons = [...tabs.querySelectorAll("[role=tab]")];
  const choose = (chosen) => {
    for (const button of buttons) {
      const on = button === chosen;
      button.setAttribute("aria-selected", on);
      button.tabIndex = on ? 0 : -1;
      document.getElementById(button.getAttribute("aria-controls")).hidden = !on;
    }
  };
  choose(buttons[0]);
  buttons.forEach((button, n) => {
    button.addEventListener("click", () => choose(button));
    button.addEventListener("keydown", (event) => {
      const to = { ArrowRight: n + 1, ArrowLeft: n - 1 }[event.key];
      if (to === undefined) return;
      const next = buttons[(to + buttons.length) % buttons.length];
      choose(next);
      next.focus();
    });
  });
}

// What scrolls sideways can be reached, and so scrolled, by the keyboard.
function reachable() {
  for (const each of document.querySelectorAll(".wide, .math, figure, .said, pre")) {
    const scrolls = each.scrollWidth > each.clientWidth || each.scrollHeight > each.clientHeight + 1;
    if (scrolls) each.tabIndex = 0;
    else each.removeAttribute("tabindex");
    shade(each);
  }
}
// What goes on at the right fades there.
function shade(each) {
  each.toggleAttribute("data-more", each.scrollLeft + each.clientWidth < each.scrollWidth - 1);
}
document.addEventListener("scroll", ({ target }) => target !== document && shade(target), true);
addEventListener("load", reachable);
addEventListener("resize", reachable);
document.addEventListener("toggle", reachable, true);

// Where the reader is, in the outline.
const marks = new Map([...document.querySelectorAll(".outline a")].map((link) => [link.hash.slice(1), link]));
const watch = new IntersectionObserver(
  (entries) => {
    for (const { target, isIntersecting } of entries) {
      if (!isIntersecting) continue;
      for (const link of marks.values()) link.classList.remove("here");
      marks.get(target.id).classList.add("here");
    }
  },
  { rootMargin: "-10% 0px -75% 0px" },
);
for (const name of marks.keys()) watch.observe(document.getElementById(name));

// On paper, what is folded is open.
addEventListener("beforeprint", () => {
  for (const each of document.querySelectorAll("details")) each.open = true;
});
