// The explorer's page: reads the settings, computes the formulas (evaluate.js), draws bars and tables.
(() => {
  "use strict";
  const data = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);
  const NUMBERS = ["memory", "devices", "prompt", "response", "groups", "responses", "micro_batch_tokens", "rank"];
  const CHOICES = ["model", "device", "shard", "adapter", "compute", "recompute", "reward"];
  const models = new Map(data.models.map((model) => [model.key, model]));
  const devices = new Map(data.devices.map((device) => [device.key, device]));
  const methods = new Map(data.methods.map((method) => [method.key, method]));
  const GIB = 2 ** 30;
  let state = {};

  // ---- words and figures
  const whole = (x) => Math.round(x).toLocaleString("en");
  function bytes(x) {
    if (x <= 0) return "0";
    if (x < 0.9995 * 2 ** 20) return "< 1 MiB";
    const [size, unit] = x < 0.9995 * GIB ? [x / 2 ** 20, "MiB"] : [x / GIB, "GiB"];
    return `${size.toLocaleString("en", { maximumFractionDigits: size < 99.95 && unit === "GiB" ? 1 : 0 })}\u00a0${unit}`;
  }
  function seconds(x) {
    const [size, unit] = x < 90 ? [x, "s"] : x < 5400 ? [x / 60, "min"] : [x / 3600, "h"];
    return `${size.toLocaleString("en", { maximumSignificantDigits: 2 })}\u00a0${unit}`;
  }
  const listed = (names) => names.length < 2 ? names.join("") : `${names.slice(0, -1).join(", ")} and ${names.at(-1)}`;
  const COUNTS = ["none", "one", "two", "three", "four", "five", "six"];
  function make(tag, attributes = {}, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) if (value !== null) made.setAttribute(name, value);
    made.append(...children);
    return made;
  }

  // ---- settings: in the form, in the address
  function defaults() {
    return { ...data.defaults, method: data.methods[0].key };
  }
  function fromAddress() {
    const found = defaults(), given = new URLSearchParams(location.hash.slice(1)), unknown = [];
    if (devices.has(given.get("device"))) found.memory = devices.get(given.get("device")).gib;
    for (const [name, value] of given) {
      if (NUMBERS.includes(name)) {
        const number = value.trim() ? Number(value) : NaN;
        if (!problem($(name), number)) { found[name] = number; continue; }
      } else if (name === "method" ? methods.has(value) : CHOICES.includes(name) && [...$(name).options].some((o) => o.value === value)) {
        found[name] = value; continue;
      }
      unknown.push(`${name}=${value}`.slice(0, 40));
    }
    return [found, unknown];
  }
  function toAddress() {
    const kept = new URLSearchParams();
    for (const name of ["method", ...CHOICES, ...NUMBERS]) if (name !== "memory" || state.memory !== devices.get(state.device).gib) kept.set(name, state[name]);
    try { history.replaceState(null, "", `#${kept}`); } catch { /* a page in a frame without an address */ }
  }
  function toForm() {
    for (const name of [...NUMBERS, ...CHOICES]) { $(name).value = state[name]; said($(name), ""); }
    for (const slider of document.querySelectorAll(".slider")) place(slider);
  }
  function place(slider) {
    const value = state[slider.dataset.for];
    slider.value = Math.log2(value);
    slider.setAttribute("aria-valuetext", `${whole(value)} tokens`);
  }
  function problem(field, value) {
    if (value >= +field.min && value <= +field.max && (field.step === "any" || Number.isInteger(value))) return "";
    return `A ${field.step === "any" ? "" : "whole "}number from ${whole(field.min)} to ${whole(field.max)}`;
  }
  function said(field, problem) {
    const hint = $(`${field.id}-said`);
    field.setAttribute("aria-invalid", problem ? "true" : "false");
    if (hint && (problem || "said" in hint.dataset)) hint.textContent = problem || hint.dataset.said;
    if (hint) hint.classList.toggle("wrong", Boolean(problem));
  }
  function changed(field) {
    if (field.classList.contains("slider")) {
      state[field.dataset.for] = Math.min(2 ** Math.round(field.value), +$(field.dataset.for).max);
      $(field.dataset.for).value = state[field.dataset.for];
      said($(field.dataset.for), "");
      place(field);
    } else if (field.name === "method") {
      state.method = field.value;
    } else if (CHOICES.includes(field.id)) {
      state[field.id] = field.value;
      if (field.id === "device") { state.memory = devices.get(field.value).gib; $("memory").value = state.memory; said($("memory"), ""); }
    } else if (NUMBERS.includes(field.id)) {
      const value = field.valueAsNumber;
      if (problem(field, value)) {
        said(field, `${problem(field, value)}; the figures shown are for ${state[field.id].toLocaleString("en")}.`);
        return;
      }
      said(field, "");
      state[field.id] = value;
      const slider = document.querySelector(`[data-for=${field.id}]`);
      if (slider) place(slider);
    }
    toAddress();
    show();
  }

  // ---- the plan of every method
  function plans() {
    const model = models.get(state.model), device = devices.get(state.device), limit = state.memory * GIB;
    const values = evaluate(data.table, { ...state, ...model.numbers, ...device.numbers });
    const chosen = { ...state, kind: model.kind, engine: device.engine, shard: state.devices > 1 ? state.shard : "no" };
    const found = data.methods.map((method) => {
      const at = data.dimensions.reduce((place, [name, options]) => place * options.length + options.indexOf(name === "method" ? method.key : chosen[name]), 0);
      const [least, seconds, ...listed] = data.graphs[data.which[at]];
      const phases = listed.map((place) => {
        const [name, ...parts] = data.phases[place];
        const read = parts.map((part) => data.parts[part]).map(([role, kind, formula]) => ({ role: data.roles[role], kind: data.kinds[kind], bytes: values[formula] }));
        return { name: data.phase_names[name], parts: read, bytes: read.reduce((sum, part) => sum + part.bytes, 0) };
      });
      const fullest = phases.reduce((most, phase) => (phase.bytes > most.bytes ? phase : most));
      return { method, phases, fullest, bytes: fullest.bytes, fits: fullest.bytes <= limit, least: values[least], seconds: values[seconds] };
    });
    return [limit, found];
  }
  const byKind = (parts) => data.kinds.map((kind, i) => [i, kind, parts.reduce((sum, part) => sum + (part.kind === kind ? part.bytes : 0), 0)]).filter(([, , size]) => size > 0);

  // ---- bars
  function scale(limit, sizes) {
    const most = Math.max(...sizes);
    return most < limit / 5 ? most * 1.05 : Math.max(most, limit) * 1.02;
  }
  function bar(parts, end, limit) {
    const wide = $("methods").clientWidth / 100;
    const drawn = make("div", { class: "bar", "aria-hidden": "true" });
    for (const [i, kind, size] of byKind(parts)) {
      const share = (100 * size) / end;
      const piece = make("span", { class: `piece kind-${i}`, title: `${kind}: ${bytes(size)}` });
      piece.style.width = `${share}%`;
      if (share * wide > 13) piece.append(share * wide > 74 ? `${data.letters[i]} ${bytes(size)}` : data.letters[i]);
      drawn.append(piece);
    }
    if (limit <= end) {
      const line = make("i", { class: "limit" });
      line.style.left = `${(100 * limit) / end}%`;
      drawn.append(line);
    }
    return drawn;
  }
  function verdict(peak, limit) {
    if (peak > limit) return `does not fit, ${bytes(peak - limit)} over`;
    return `${peak * (1 + data.worst_error) > limit ? "fits, if barely" : "fits"}, ${bytes(limit - peak)} free`;
  }
  function axis(limit, end) {
    const text = limit <= end ? `${bytes(limit)}: all that the device has` : `The device has ${bytes(limit)}, beyond the right edge`;
    const line = make("div", { class: limit <= end ? "axis" : "axis beyond", "aria-hidden": "true" }, make("span", {}, text));
    const at = Math.min(100, (100 * limit) / end);
    if (limit <= end) line.firstChild.style[at > 50 ? "right" : "left"] = at > 50 ? `${100 - at}%` : `${at}%`;
    return line;
  }
  function methodRow(plan, end, limit) {
    const { method } = plan, chosen = method.key === state.method;
    const radio = make("input", { type: "radio", name: "method", value: method.key, id: `method-${method.key}`, "aria-describedby": `figures-${method.key}` });
    radio.checked = chosen;
    const fits = make("b", { class: plan.fits ? "good" : "bad" }, `${plan.fits ? "✓" : "✗"} ${verdict(plan.bytes, limit)}`);
    const label = make("label", { for: radio.id }, radio, make("span", { class: "name" }, method.title));
    const figures = make("span", { class: "figures-line", id: `figures-${method.key}` }, make("b", {}, bytes(plan.bytes)), ` in ${plan.fullest.name} · `, fits, ` · ${seconds(plan.seconds)} a step`);
    const row = make("div", { class: chosen ? "row chosen" : "row" }, make("div", { class: "head-line" }, label, figures), bar(plan.fullest.parts, end, limit));
    row.addEventListener("click", () => { if (!radio.checked) { radio.checked = true; changed(radio); } });
    return row;
  }
  function drawMethods(found, limit) {
    const end = scale(limit, found.map((plan) => plan.bytes));
    const held = document.activeElement?.name === "method";
    $("methods").replaceChildren(...found.map((plan) => methodRow(plan, end, limit)), axis(limit, end));
    if (held) $(`method-${state.method}`).focus();
  }
  function drawPhases(plan, limit) {
    const end = scale(limit, plan.phases.map((phase) => phase.bytes));
    $("phases-title").textContent = `${plan.method.title}, phase by phase`;
    $("phases").replaceChildren(...plan.phases.map((phase) => {
      const full = phase === plan.fullest;
      const figures = make("span", { class: "figures-line" }, make("b", {}, bytes(phase.bytes)), full ? " · the fullest" : "");
      return make("div", { class: "row" }, make("div", { class: "head-line" }, make("span", {}, make("b", {}, phase.name), `: ${data.phase_words[phase.name]}`), figures), bar(phase.parts, end, limit));
    }), axis(limit, end));
  }
  function drawLegend(found) {
    const used = new Set(found.flatMap((plan) => plan.phases.flatMap((phase) => byKind(phase.parts).map(([i]) => i))));
    $("legend").replaceChildren(...[...used].sort((a, b) => a - b).map((i) => make("li", {}, make("span", { class: `swatch kind-${i}`, "aria-hidden": "true" }, data.letters[i]), data.kinds[i])));
  }

  // ---- tables
  function fill(table, caption, header, rows) {
    const head = make("tr", {}, ...header.map((text) => make("th", { scope: "col" }, text)));
    const body = rows.map(([first, ...cells]) => make("tr", {}, make("th", { scope: "row" }, first), ...cells.map((cell) => make("td", {}, cell))));
    table.replaceChildren(make("caption", {}, make("span", {}, caption)), make("thead", {}, head), make("tbody", {}, ...body));
  }
  function tableOfKinds(found, limit) {
    const held = found.map((plan) => new Map(byKind(plan.fullest.parts).map(([, kind, size]) => [kind, size])));
    const kinds = data.kinds.filter((kind) => held.some((one) => one.has(kind)));
    fill($("by-kind"), `Each method at its fullest moment; the device has ${bytes(limit)}`, ["Kind", ...found.map((plan) => plan.method.title)], [
      ...kinds.map((kind) => [kind, ...held.map((one) => (one.has(kind) ? bytes(one.get(kind)) : "–"))]),
      ["Together", ...found.map((plan) => bytes(plan.bytes))],
      ["Fullest in", ...found.map((plan) => plan.fullest.name)],
      ["Fits", ...found.map((plan) => (!plan.fits ? "no" : plan.bytes * (1 + data.worst_error) > limit ? "barely" : "yes"))],
      ["Time a step", ...found.map((plan) => seconds(plan.seconds))],
    ]);
  }
  function tableOfRoles(plan) {
    const key = (part) => `${part.role || "no model's own"}\n${part.kind}`;
    const rows = [...new Set(plan.phases.flatMap((phase) => phase.parts.filter((part) => part.bytes > 0).map(key)))].sort((a, b) => {
      const place = (text) => data.roles.indexOf(text.split("\n")[0]) * 100 + data.kinds.indexOf(text.split("\n")[1]);
      return (place(a) < 0) - (place(b) < 0) || place(a) - place(b);
    });
    fill($("by-role"), `${plan.method.title}: which model holds what, phase by phase`, ["Model", "Kind", ...plan.phases.map((phase) => phase.name)],
      [...rows.map((row) => [...row.split("\n"), ...plan.phases.map((phase) => {
        const size = phase.parts.filter((part) => key(part) === row).reduce((sum, part) => sum + part.bytes, 0);
        return size ? bytes(size) : "–";
      })]), ["Together", "", ...plan.phases.map((phase) => bytes(phase.bytes))]]);
  }

  // ---- what is said
  function sentence(found) {
    const where = `${state.devices > 1 ? `${whole(state.devices)} devices` : "one device"} of ${bytes(state.memory * GIB)}`;
    const fitting = found.filter((plan) => plan.fits).map((plan) => plan.method.title), model = models.get(state.model).title;
    if (fitting.length === found.length) return `${model} on ${where}: all ${COUNTS[found.length] ?? found.length} methods fit.`;
    if (!fitting.length) return `${model} on ${where}: none of the methods fits.`;
    const rest = found.filter((plan) => !plan.fits).map((plan) => plan.method.title);
    return fitting.length <= rest.length ? `${model} on ${where}: only ${listed(fitting)} ${fitting.length > 1 ? "fit" : "fits"}.` : `${model} on ${where}: all fit but ${listed(rest)}.`;
  }
  function warnings(found, unknown) {
    const model = models.get(state.model), { context } = model, told = [];
    if (unknown.length) told.push(`The address holds what this page does not know, and leaves out: ${listed(unknown)}.`);
    if (context && state.prompt + state.response > context) told.push(`Prompt and response are ${whole(state.prompt + state.response)} tokens, and ${model.title} reads ${whole(context)} at most: such a run is refused.`);
    const small = found.filter((plan) => plan.least > state.micro_batch_tokens);
    const sizes = [...new Set(small.map((plan) => plan.least))].map((size) => `${whole(size)} for ${listed(small.filter((plan) => plan.least === size).map((plan) => plan.method.title))}`);
    if (small.length) told.push(`A micro-batch of ${whole(state.micro_batch_tokens)} tokens is too small for a prompt with its responses. Counted is the least that holds them: ${sizes.join("; ")}.`);
    return told;
  }
  let later = 0;
  function announce(text) {
    clearTimeout(later);
    // Whoever holds an arrow key down hears the last figure only.
    later = setTimeout(() => { $("announced").textContent = text; }, 500);
  }
  function show(unknown = []) {
    const [limit, found] = plans(), plan = found.find((one) => one.method.key === state.method), model = models.get(state.model);
    $("rank").disabled = state.adapter === "none";
    $("shard").disabled = state.devices === 1;
    $("model-said").textContent = model.said;
    const text = sentence(found), most = found.reduce((a, b) => (b.bytes > a.bytes ? b : a)), least = found.reduce((a, b) => (b.bytes < a.bytes ? b : a));
    $("sentence").textContent = text;
    const chosen = (id) => $(id).selectedOptions[0].textContent;
    $("facts").textContent = [`${whole(state.prompt)} + ${whole(state.response)} tokens`, `${whole(state.groups)} prompts a step`, `micro-batches of ${whole(state.micro_batch_tokens)} tokens`, state.adapter === "none" ? "all weights learn" : `an adapter of rank ${state.rank} learns`, chosen("compute"), `activations ${chosen("recompute")}`].join(" · ");
    $("warnings").replaceChildren(...warnings(found, unknown).map((line) => make("li", { class: "warning" }, make("b", { class: "said" }, "Warning: "), line)));
    announce(`${text} ${most.method.title} needs the most, ${bytes(most.bytes)}; ${least.method.title} the least, ${bytes(least.bytes)}.`);
    drawLegend(found);
    drawMethods(found, limit);
    drawPhases(plan, limit);
    tableOfKinds(found, limit);
    tableOfRoles(plan);
    $("command").textContent = command(plan);
    for (const one of document.querySelectorAll(".flow")) one.hidden = one.dataset.method !== state.method;
    for (const one of document.querySelectorAll(".compared [data-method]")) one.classList.toggle("chosen", one.dataset.method === state.method);
    $("flow-title").textContent = `${plan.method.title}: who makes what from what`;
  }
  function command(plan) {
    const { rollouts } = plan.method;
    const said = [`trimtab plan ${plan.method.key} --model ${state.model} --device ${state.device}`, `--memory ${state.memory}GiB`];
    said.push(`--prompt ${state.prompt} --response ${state.response} --groups ${state.groups}`);
    if (rollouts) said.push(`--responses ${state.responses}`);
    said.push(`--micro_batch_tokens ${Math.max(state.micro_batch_tokens, plan.least)} --dtype ${state.compute}`);
    if (state.devices > 1) said.push(`--devices ${state.devices} --weights ${state.shard === "no" ? "replicate" : "shard"}`);
    if (state.adapter !== "none") said.push(`--adapter ${state.adapter} --rank ${state.rank}`);
    if (state.recompute !== "none") said.push(`--recompute ${state.recompute}`);
    if (rollouts && state.reward === "model") said.push(`--reward_model ${state.model}`);
    return said.join(" ");
  }

  function read() {
    const [found, unknown] = fromAddress();
    state = found;
    toForm();
    show(unknown);
  }
  for (const slider of document.querySelectorAll(".slider")) { slider.min = 4; slider.max = 17; slider.step = 1; }
  if (matchMedia("(max-width: 46rem)").matches) for (const part of [...document.querySelectorAll("#settings details")].slice(1)) part.open = false;
  $("settings").addEventListener("input", (event) => changed(event.target));
  $("settings").addEventListener("submit", (event) => event.preventDefault());
  $("settings").addEventListener("reset", (event) => { event.preventDefault(); state = defaults(); toForm(); toAddress(); show(); });
  $("methods").addEventListener("change", (event) => changed(event.target));
  addEventListener("hashchange", read);
  let resized = 0;
  // What is written in a bar depends on its width.
  addEventListener("resize", () => { cancelAnimationFrame(resized); resized = requestAnimationFrame(() => show()); });
  read();
})();
