# make train: a first run and its full-attention twin.  make ablations: seven small runs, compared.
# make test: everything that needs no GPU, but the slow faults: make chaos is 500 steps with random ones, 10 minutes.
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python
TORCH = $(shell grep '^torch==' requirements.txt)

.PHONY: train ablations test chaos clean
train: $(VENV)/.done corpus/stdlib/manifest.json
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" launch/demo.sh corpus/stdlib

ablations: $(VENV)/.done corpus/stdlib/manifest.json
	$(RUN) train.py -m experiment=ablations data.path=corpus/stdlib run.dir=runs/ablations

test: $(VENV)/.done
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m pytest

chaos: $(VENV)/.done
	$(RUN) -m pytest -m slow tests/faults/test_chaos.py

corpus/stdlib/manifest.json: $(VENV)/.done
	$(RUN) -m data.prepare --input stdlib --limit-mb 12 --output corpus/stdlib --tokenizer bpe:4096

# torch first and alone: a CPU build that satisfies the pin keeps the CUDA packages away.
$(VENV)/.done: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

clean:
	rm -rf $(VENV) corpus runs
