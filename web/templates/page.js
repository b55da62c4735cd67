
// The server's page: a form for new videos, and cards that follow theirs. Everything that is shown
// comes from the server as text or as cards that the server has escaped.
const form = document.querySelector("form");
const problem = form.querySelector("[role=alert]");
const announce = document.querySelector(".announce");
const submit = form.querySelector("[type=submit]");
const numbers = ["num_frames", "num_inference_steps", "guidance_scale", "seed"];

function cardOf(id) {
  return document.querySelector(`article[data-id="${CSS.escape(id)}"]`);
}

function duration(seconds) {
  if (seconds < 100) return `${Math.max(1, Math.round(seconds))} s`;
  return seconds < 6000 ? `${Math.round(seconds / 60)} min` : `${(seconds / 3600).toFixed(1)} h`;
}

function describe(video) {
  const left = video.seconds_left === null ? "" : `, about ${duration(video.seconds_left)} left`;
  if (video.status === "queued") return `place ${video.queue_position} in the queue${left}`;
  const steps = `step ${video.steps_done} of ${video.steps_total}`;
  if (video.activity === "denoising") return `${steps}${left}`;
  return `${video.activity ?? "starting"}${left}`;
}

// Cards are fetched one at a time, so that an older answer never replaces a newer one.
let fetching = Promise.resolve();
function fetchCard(id) {
  fetching = fetching.then(async () => {
    const answer = await fetch(`/cards/${id}`);
    if (!answer.ok) return;
    const holder = document.createElement("template");
    holder.innerHTML = await answer.text();
    const card = holder.content.querySelector("article");
    const old = cardOf(id);
    if (old) old.replaceWith(card);
    else document.querySelector("main").prepend(card);
    filter();
  });
  return fetching;
}

const discarded = new Set(); // ids

async function update(video) {
  if (discarded.has(video.id)) return;
  let card = cardOf(video.id);
  if (card?.dataset.state !== video.status) {
    if (card && ["completed", "failed"].includes(video.status)) {
      announce.textContent = `${video.prompt.slice(0, 80)}: ${video.status}`;
    }
    await fetchCard(video.id);
    card = cardOf(video.id);
  }
  const bar = card?.querySelector("progress");
  if (!bar || ["completed", "failed"].includes(video.status)) return;
  bar.max = video.steps_total;
  if (video.status === "queued") bar.value = 0;
  else if (video.activity === "denoising" || video.steps_done) bar.value = video.steps_done;
  else bar.removeAttribute("value");
  bar.nextElementSibling.textContent = describe(video);
  const picture = card.querySelector(".preview img");
  if (picture && video.preview && picture.getAttribute("src") !== video.preview) {
    picture.src = video.preview;
    picture.hidden = false;
  }
}

function remove(id) {
  cardOf(id)?.remove();
  filter();
}

const events = new EventSource("/v1/events");
events.addEventListener("video", (event) => update(JSON.parse(event.data)));
events.addEventListener("deleted", (event) => {
  const { id } = JSON.parse(event.data);
  discarded.delete(id);
  remove(id);
});
events.addEventListener("error", () => {
  announce.textContent = "The connection was lost; trying again.";
});

function say(error) {
  problem.textContent = error.message;
  for (const field of form.elements) {
    if (field.name) field.setAttribute("aria-invalid", String(field.name === error.param));
  }
  form.querySelector("[aria-invalid=true]")?.focus();
}

async function errorOf(answer) {
  try {
    return (await answer.json()).error;
  } catch {
    return { message: `The server answered ${answer.status}.` };
  }
}

// JSON, or with an image a form.
function send(body) {
  if (!body.input_reference) {
    const headers = { "Content-Type": "application/json" };
    return fetch("/v1/videos", { method: "POST", headers, body: JSON.stringify(body) });
  }
  const fields = new FormData();
  for (const [name, value] of Object.entries(body)) fields.append(name, value);
  return fetch("/v1/videos", { method: "POST", body: fields });
}

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  const body = {};
  for (const [name, value] of new FormData(form)) {
    if (value !== "") body[name] = numbers.includes(name) ? Number(value) : value;
  }
  if (body.lora) body.lora = `${body.lora}=${body.lora_weight}`;
  delete body.lora_weight;
  submit.disabled = true;
  say({ message: "" });
  try {
    const answer = await send(body);
    if (!answer.ok) return say(await errorOf(answer));
    const video = await answer.json();
    await update(video);
    announce.textContent = `Accepted: ${describe(video)}`;
  } catch (error) {
    say({ message: `The server does not answer: ${error.message}` });
  } finally {
    submit.disabled = false;
  }
});

form.addEventListener("reset", () => say({ message: "" }));

async function reuse(id) {
  const answer = await fetch(`/v1/videos/${id}`);
  if (!answer.ok) return say(await errorOf(answer));
  const video = await answer.json();
  const [lora, weight] = (video.lora ?? "").split("=");
  const values = { ...video, lora, lora_weight: weight ?? "1" };
  for (const field of form.elements) {
    if (field.name && field.type !== "file" && field.name in values) field.value = values[field.name];
  }
  if (form.elements.speed.selectedIndex < 0) form.elements.speed.value = "exact";
  form.elements.prompt.focus();
  form.scrollIntoView({ block: "center" });
}

async function discard(id, label) {
  if (!confirm(`${label} this video? Its files are deleted.`)) return;
  // The card goes first, so that it asks for no preview of what is gone.
  discarded.add(id);
  remove(id);
  const answer = await fetch(`/v1/videos/${id}`, { method: "DELETE" });
  if (!answer.ok && answer.status !== 404) {
    discarded.delete(id);
    await fetchCard(id);
    return say(await errorOf(answer));
  }
  announce.textContent = "Deleted.";
  form.elements.prompt.focus();
}

document.querySelector("main").addEventListener("click", (event) => {
  const button = event.target.closest("button[data-action]");
  if (!button) return;
  const { id } = button.closest("article").dataset;
  if (button.dataset.action === "reuse") reuse(id);
  else discard(id, button.textContent);
});
