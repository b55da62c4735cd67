"use strict";
const search = document.querySelector("input[type=search]");
const buttons = [...document.querySelectorAll("button[data-status]")];
const shown = document.querySelector("output");
const none = document.querySelector(".none");
// Of cards, in lower case.
const texts = new WeakMap();

function textOf(card) {
  if (!texts.has(card)) texts.set(card, card.textContent.toLowerCase());
  return texts.get(card);
}

function filter() {
  const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
  const { status } = buttons.find((b) => b.getAttribute("aria-pressed") === "true").dataset;
  const cards = [...document.querySelectorAll("article")];
  let count = 0;
  for (const card of cards) {
    const wanted =
      (!status || card.dataset.status === status) &&
      words.every((word) => textOf(card).includes(word));
    card.hidden = !wanted;
    if (!wanted) card.querySelector("video")?.pause();
    count += wanted;
  }
  for (const button of buttons) {
    const own = button.dataset.status;
    const count = cards.filter((card) => !own || card.dataset.status === own).length;
    button.querySelector("b").textContent = count;
    button.hidden = count === 0 && own !== "" && own !== status;
  }
  shown.textContent = count === cards.length ? "" : `${count} shown`;
  none.hidden = count > 0 || cards.length === 0;
}

function press(button) {
  for (const other of buttons) other.setAttribute("aria-pressed", String(other === button));
  filter();
}

search.addEventListener("input", filter);
for (const button of buttons) button.addEventListener("click", () => press(button));

// A player replaces the contact sheet only when asked for: hundreds of players would read hundreds
// of videos.
document.querySelector("main").addEventListener("click", (event) => {
  const link = event.target.closest(".play");
  if (!link || event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  const video = document.createElement("video");
  Object.assign(video, { controls: true, loop: true, muted: true, playsInline: true });
  video.preload = "none";
  video.width = link.dataset.width;
  video.height = link.dataset.height;
  video.poster = link.querySelector("img").src;
  video.src = link.href;
  link.replaceWith(video);
  video.focus();
  video.play().catch((error) => video.setAttribute("title", error.message));
});

// While jobs are left, load the page again, but not while someone types, watches or reads details.
// The fragment keeps the filter.
const main = document.querySelector("main");
if (main.dataset.refresh) {
  setInterval(() => {
    const busy =
      document.hidden ||
      document.activeElement === search ||
      document.querySelector("video, details[open]") ||
      String(getSelection());
    if (busy) return;
    const { status } = buttons.find((b) => b.getAttribute("aria-pressed") === "true").dataset;
    const kept = new URLSearchParams({ text: search.value, status });
    history.replaceState(null, "", `#${kept}`);
    location.reload();
  }, 1000 * main.dataset.refresh);
}
const kept = new URLSearchParams(location.hash.slice(1));
if (kept.has("text")) search.value = kept.get("text");
press(buttons.find((button) => button.dataset.status === kept.get("status")) ?? buttons[0]);
