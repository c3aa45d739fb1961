// The page at /ui: a chat against /v1/chat/completions and charts from /hasten/stats.
// Everything that comes from a model or a server enters the page as text, never as markup.

import { Chart, SPAN } from "./charts.js";

const $ = (id) => document.getElementById(id);

function add(parent, name, className, text = "") {
  const node = document.createElement(name);
  node.className = className;
  node.textContent = text;
  parent.append(node);
  return node;
}

// ---- chat

const history = []; // {role, content} of what was said and answered
let model = null; // as the server calls it
let running = null; // AbortController of the answer under way

class RequestError extends Error {}

function request() {
  const messages = [...history];
  const system = $("system").value.trim();
  if (system) messages.unshift({ role: "system", content: system });
  const body = {
    model,
    messages,
    stream: true,
    stream_options: { include_usage: true, continuous_usage_stats: true },
  };
  const numbers = { temperature: "temperature", max_tokens: "max-tokens", seed: "seed" };
  for (const [field, id] of Object.entries(numbers)) {
    if (!$(id).checkValidity()) {
      showSettings(true);
      throw new RequestError(`${field} is out of range or not a number.`);
    }
    if ($(id).value !== "") body[field] = Number($(id).value);
  }
  return body;
}

async function refusal(response) {
  const text = await response.text();
  try {
    return JSON.parse(text).error.message;
  } catch {
    return `The server answered ${response.status} ${response.statusText}.`;
  }
}

// The objects of an event stream, one by one, until [DONE].
async function* events(response) {
  const decoder = new TextDecoder();
  let rest = "";
  for (const reader = response.body.getReader(); ;) {
    const { value, done } = await reader.read();
    if (done) throw new RequestError("The server ended the answer early.");
    const lines = (rest + decoder.decode(value, { stream: true })).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue; // blank lines between events, comments
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

// One answer: what came, when, and how it shows. Tokens may come faster than the screen changes, so
// the page is touched at most once a frame.
class Answer {
  constructor() {
    this.node = add($("log"), "article", "turn assistant waiting blank");
    this.text = add(this.node, "div", "text");
    this.figures = add(this.node, "div", "figures");
    this.content = "";
    this.shown = this.text.appendChild(document.createTextNode(""));
    this.frame = null;
    this.sent = performance.now();
    this.first = this.last = null;
    this.firstTokens = this.tokens = 0;
    this.ending = null;
  }

  take(event) {
    if (event.error) throw new RequestError(event.error.message);
    const choice = event.choices[0];
    const tokens = event.usage?.completion_tokens ?? this.tokens;
    if (tokens > this.tokens && choice) {
      this.last = performance.now();
      if (this.first === null) [this.first, this.firstTokens] = [this.last, tokens];
    }
    this.tokens = tokens;
    this.content += choice?.delta.content ?? "";
    if (choice?.finish_reason) this.ending = choice.finish_reason;
    this.frame ??= requestAnimationFrame(() => this.show());
  }

  show() {
    this.frame = null;
    follow(() => {
      this.shown.appendData(this.content.slice(this.shown.length));
      this.node.classList.toggle("blank", !this.content);
      this.measure();
    });
  }

  measure() {
    const parts = [`${this.tokens} token${this.tokens === 1 ? "" : "s"}`];
    if (this.tokens > this.firstTokens && this.last > this.first) {
      parts.push(`${((1000 * (this.tokens - this.firstTokens)) / (this.last - this.first)).toFixed(1)} tok/s`);
    }
    if (this.first !== null) parts.push(`first after ${seconds((this.first - this.sent) / 1000)}`);
    if (this.ending === "length") parts.push("cut at max tokens");
    if (this.ending === "stopped") parts.push("stopped");
    this.figures.textContent = parts.join(" · ");
  }

  end() {
    cancelAnimationFrame(this.frame);
    this.node.classList.remove("waiting");
    this.show();
  }
}

// Change the log and keep its end in sight, unless the reader has scrolled up.
function follow(change) {
  const log = $("log");
  const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
  change();
  if (atEnd) log.scrollTop = log.scrollHeight;
}

async function say(text) {
  $("empty").hidden = true;
  const mine = add($("log"), "article", "turn user");
  add(mine, "div", "text", text);
  const answer = new Answer();
  $("log").scrollTop = $("log").scrollHeight;
  const controller = (running = new AbortController());
  busy(true);
  history.push({ role: "user", content: text });
  try {
    const response = await fetch("../v1/chat/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(request()),
      signal: controller.signal,
    });
    if (!response.ok) throw new RequestError(await refusal(response));
    for await (const event of events(response)) answer.take(event);
  } catch (error) {
    if (controller.signal.aborted) answer.ending = "stopped";
    else fail(answer, error);
  }
  if (controller.signal.reason === "new chat") return;
  answer.end();
  if (answer.content) {
    history.push({ role: "assistant", content: answer.content });
  } else if (answer.ending === null || answer.ending === "stopped") {
    history.pop(); // it was not answered: the text goes back, to be sent again
    mine.classList.add("unsent");
    if (!answer.tokens) answer.figures.textContent = "";
    if (!$("input").value) $("input").value = text;
  } else {
    history.push({ role: "assistant", content: "" });
  }
  running = null;
  busy(false);
  $("input").focus();
}

function fail(answer, error) {
  const message = error instanceof RequestError
    ? error.message
    : "The server cannot be reached. It may be starting again; try in a moment.";
  follow(() => add(answer.node, "div", "error", message).setAttribute("role", "alert"));
}

function busy(on) {
  $("send").hidden = on;
  $("stop").hidden = !on;
}

function showSettings(on) {
  $("settings").hidden = !on;
  $("settings-button").setAttribute("aria-expanded", String(on));
}

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("input").value;
  if (running || !text.trim()) return;
  $("input").value = "";
  say(text);
});

$("input").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("composer").requestSubmit();
});

$("stop").addEventListener("click", () => running?.abort("stop"));

$("settings").addEventListener("submit", (event) => event.preventDefault());

$("settings-button").addEventListener("click", () => showSettings($("settings").hidden));

$("clear").addEventListener("click", () => {
  running?.abort("new chat");
  running = null;
  busy(false);
  history.length = 0;
  for (const turn of document.querySelectorAll(".turn")) turn.remove();
  $("empty").hidden = false;
  $("input").focus();
});

// ---- live figures

function seconds(value) {
  if (value === 0) return "0";
  return value < 1 ? `${Number((1000 * value).toPrecision(3))} ms` : `${Number(value.toPrecision(3))} s`;
}

function count(value) {
  if (value >= 1e6) return `${Number((value / 1e6).toPrecision(3))}M`;
  if (value >= 1e4) return `${Number((value / 1e3).toPrecision(3))}k`;
  return String(Number.isInteger(value) ? value : Number(value.toPrecision(3)));
}

function percent(value) {
  return `${Number((100 * value).toFixed(value < 0.1 ? 1 : 0))} %`;
}

const charts = [
  {
    title: "Throughput, tokens/s",
    series: [{ name: "tokens/s", field: "tokens_per_second" }],
    format: count,
    least: 10,
  },
  {
    title: "Time to first token",
    series: [{ name: "p50", field: "ttft_p50" }, { name: "p90", field: "ttft_p90" }],
    format: seconds,
    least: 0.01,
    empty: "no request ended lately",
  },
  {
    title: "Requests",
    series: [{ name: "running", field: "running" }, { name: "waiting", field: "waiting" }],
    format: count,
    least: 2,
  },
  {
    title: "KV pages in use",
    series: [{ name: "used", field: "page_use" }],
    format: percent,
    top: 1,
  },
  {
    title: "Drafted tokens accepted",
    series: [{ name: "accepted", field: "acceptance" }],
    format: percent,
    top: 1,
    empty: "nothing was drafted",
  },
].map((options) => new Chart($("charts"), options));

const samples = [];

function showTotals(stats) {
  const requests = stats.requests;
  const figures = {
    "Answered": count(requests.ok ?? 0),
    "Cancelled": count(requests.cancelled ?? 0),
    "Rejected, refused": count((requests.rejected ?? 0) + (requests.refused ?? 0)),
    "Failed": count(requests.failed ?? 0),
    "Prompt tokens": count(stats.prompt_tokens),
    "Tokens sent": count(stats.generation_tokens),
  };
  if (stats.engine) {
    figures["Cached pages"] = count(stats.pages_cached);
    figures["Preemptions"] = count(stats.preemptions);
    figures["Engine memory"] = `${count(Math.round(stats.rss_bytes / 2 ** 20))} MiB`;
  }
  const list = $("totals");
  list.replaceChildren();
  for (const [name, value] of Object.entries(figures)) {
    const entry = add(list, "div", "total");
    add(entry, "dt", "", name);
    add(entry, "dd", "", value);
  }
}

function showStatus(className, text) {
  $("status").className = `status ${className}`;
  if ($("status").textContent !== text) $("status").textContent = text;
}

async function poll() {
  const sample = { time: performance.now() / 1000 };
  try {
    const response = await fetch("../hasten/stats", { signal: AbortSignal.timeout(5000), cache: "no-store" });
    if (!response.ok) throw new Error(await refusal(response));
    const stats = await response.json();
    Object.assign(sample, stats, { time: performance.now() / 1000 });
    model = stats.model;
    $("model").textContent = model;
    showTotals(stats);
    if (stats.engine) showStatus("up", "connected");
    else showStatus("", "loading the model");
  } catch {
    showStatus("away", "server away, trying again"); // the gap in the lines says since when
  }
  samples.push(sample);
  const now = performance.now() / 1000;
  while (samples[0].time < now - SPAN) samples.shift();
  for (const chart of charts) chart.update(samples, now);
  setTimeout(poll, 1000);
}

poll();
