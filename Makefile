PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest

.PHONY: venv demo test lint goldens oracle bench clean

venv: $(VENV)/.ready

$(VENV)/.ready: setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[test]"
	touch $@

$(VENV)/.oracle: $(VENV)/.ready
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[test,oracle]"
	touch $@

# No trained model ships yet: a tiny random one shows the whole path, from a checkpoint, a picture and a voice to an mp4.
demo: $(VENV)/.ready
	rm -rf demo_model
	$(BIN)/wan-jax convert random demo_model --tiny wan2.6
	@echo "The weights are random: picture and sound show that every part runs, not what a trained model makes."
	$(BIN)/wan-jax generate --model demo_model --reference wan_jax/assets/puppet.png --voice wan_jax/assets/puppet.wav \
		--i-have-consent --prompt 'Character1 says "ba do mi" in front of a blue wall.' \
		--size 96x96 --num-frames 49 --num-steps 8 --output demo.mp4 --profile
	$(BIN)/wan-jax verify demo.mp4

lint: $(VENV)/.ready
	$(BIN)/ruff check .

test: lint
	$(PYTEST) -m "not oracle and not device" -n 2

goldens: $(VENV)/.ready
	$(PYTEST) -m goldens

oracle: $(VENV)/.oracle
	$(PYTEST) -m oracle -n 2

bench: $(VENV)/.oracle
	$(BIN)/python benchmarks/dit_cpu.py
	$(BIN)/python benchmarks/loading.py

clean:
	rm -rf $(VENV) demo_model demo.mp4
