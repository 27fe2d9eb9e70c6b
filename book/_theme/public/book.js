// What a page does in the browser: dark or light, the menu, search, copying, the outline.
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

// Search: the index is fetched when the field is first used.
const field = document.querySelector(".search input");
const list = document.querySelector(".found");
const status = document.querySelector(".none");
let index;

const load = () =>
  (index ??= Promise.all([
    import("./search.mjs"),
    fetch(field.dataset.index).then((answer) => answer.text()),
  ]).then(([{ find, read }, text]) => {
    const known = read(text);
    return (query) => find(known, query);
  }));

const made = (tag, ...inner) => {
  const element = document.createElement(tag);
  element.append(...inner);
  return element;
};

async function search() {
  if (!field.value.trim()) return close();
  const asked = field.value;
  const found = (await load())(asked);
  if (asked !== field.value) return;
  list.replaceChildren(
    ...found.map(({ url, page, title, excerpt }) => {
      const words = excerpt.map(([text, marked]) => (marked ? made("mark", text) : text));
      const link = made("a", made("b", [page, title].filter(Boolean).join(" › ")), ...words);
      link.href = field.dataset.base + url;
      return made("li", link);
    }),
  );
  list.hidden = !found.length;
  status.textContent = found.length ? "" : "Nothing found";
}

function close() {
  list.hidden = true;
  status.textContent = "";
}

field.addEventListener("focus", load, { once: true });
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

// Copying code, as the explorers copy their forms.
const copying = document.querySelector(".code") && import("./explorers/form.js");
for (const code of document.querySelectorAll(".code")) {
  const button = Object.assign(document.createElement("button"), {
    className: "copy",
    type: "button",
    textContent: "Copy",
  });
  button.addEventListener("click", async () => {
    const { copyText } = await copying;
    button.textContent = await copyText(code.querySelector("pre"));
    setTimeout(() => (button.textContent = "Copy"), 1500);
  });
  code.append(button);
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

// An explorer that is wider than the text lies over the outline, which steps back as soon as they meet.
const outline = document.querySelector(".outline");
const over = new Set();
const reach = outline.getBoundingClientRect().bottom;
const covers = new IntersectionObserver(
  (entries) => {
    for (const { target, isIntersecting } of entries) over[isIntersecting ? "add" : "delete"](target);
    outline.classList.toggle("covered", over.size > 0);
  },
  { rootMargin: `0px 0px ${Math.min(0, Math.round(reach - innerHeight))}px 0px` },
);
for (const each of document.querySelectorAll(".answering[data-explorer]")) covers.observe(each);

// A link or a search that lands in what is folded opens it.
function unfold() {
  const target = document.querySelector(":target");
  const folds = [];
  for (let each = target; (each = each?.closest("details")); each = each.parentElement) folds.push(each);
  if (folds.every((each) => each.open)) return;
  for (const each of folds) each.open = true;
  target.scrollIntoView();
}
addEventListener("hashchange", unfold);
document.addEventListener("click", ({ target }) => {
  // The address stays the same, so nothing else happens.
  if (target.closest?.("a")?.href === location.href) unfold();
});
unfold();

// A link to an explorer that this page lacks says so above the text.
function misled() {
  const name = new URLSearchParams(location.hash.slice(1)).get("explorer");
  const lacks = name !== null && !document.querySelector(`[data-explorer="${CSS.escape(name)}"]`);
  document.querySelector(".misled")?.remove();
  if (!lacks) return;
  // Whoever wrote the link does not write on the page.
  const shown = name.replace(/[\u202a-\u202e\u2066-\u2069]/g, "").slice(0, 60);
  const said = made("p", `This link cannot be read: this page has no explorer “${shown}”.`);
  said.className = "misled";
  said.setAttribute("role", "status");
  document.querySelector("article").prepend(said);
}
addEventListener("hashchange", misled);
misled();

// On paper, what is folded is open.
addEventListener("beforeprint", () => {
  for (const each of document.querySelectorAll("details")) each.open = true;
});
