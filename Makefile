# make demo    sets everything up, exports the Fetch policy, proves it equal to PyTorch, moves the simulated arm
# make test    sets everything up and runs all checks
# make test-elsewhere   the same tests as a stranger's machine may run them: another user, random order, read-only home
# make test-integrations   the wheel on other Pythons, the real LeRobot, openpi-client, rerun, Ray and Triton's client, in environments of their own (11 GB)
# make test-openvino   the OpenVINO backend, in an environment beside the first that has the package (200 MB)
# make lint    style and types only
# make train-demo   demonstrations and training of the Fetch policy (on two cores 40 minutes to hours, by their kind)

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT := build/demo
ROBOT := gym:FetchReach-v4
EPISODES ?= 10
export MUJOCO_GL ?= egl

.PHONY: setup demo test test-elsewhere test-integrations test-openvino lint train-demo clean

setup: $(VENV)/.ready

# Compiled on every core at once, where pip takes one, without the third of it that nothing imports. A package may hold
# files for other Pythons, which this one cannot compile.
$(VENV)/.ready: pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) not found: install Python 3.10 to 3.13, or say PYTHON=..."; exit 2; }
	@./examples/fetch/install_gl.sh
	@echo "setting up $(VENV): some minutes, 3 GB"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e '.[export,jax,hub,bench,train,lora,adamw8bit,ort,rtx,sim,record,view,remote,serve,dev]'
	@$(BIN)/python -m compileall -q -j 0 -x '/tests?/|/transformers/models/' $(VENV)/lib >/dev/null || true
	@touch $@

demo: setup
	$(BIN)/ki-export examples/fetch/checkpoint -o $(OUT)/bundle --target ort --force
	@rm -rf $(OUT)/run
	$(BIN)/ki-run $(OUT)/bundle --robot $(ROBOT) --mode async --episodes $(EPISODES) --seed 1000 --record $(OUT)/run
	@echo
	@echo "look at   $(OUT)/bundle/parity.html   (the export against PyTorch)"
	@echo "and at    $(OUT)/run/run.html         (films, actions, latency; the folder is a LeRobotDataset)"

test: setup
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

test-elsewhere: setup
	tests/elsewhere.sh

test-integrations: setup
	$(BIN)/python -m pytest -m integration

# Everything else tests the machine without it.
test-openvino: setup
	$(BIN)/python -m venv $(VENV)-openvino
	@$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" > $$($(VENV)-openvino/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/first.pth
	$(VENV)-openvino/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt 'openvino>=2026.1'
	PYTHONPATH=.:export:runtime $(VENV)-openvino/bin/python -m pytest tests/runtime/test_openvino.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

train-demo: setup
	$(BIN)/python examples/fetch/demonstrations.py build/fetch/demonstrations --points build/fetch/points --scenes 6000 --seed 0 --workers 2
	$(BIN)/ki-train build/fetch/demonstrations:2 build/fetch/points:1 -o build/fetch/run --steps 6200 --batch 48 --warmup 200 --cache build/fetch/cache
	$(BIN)/python examples/fetch/evaluate.py build/fetch/run/last --episodes 100 --seed 1000

clean:
	rm -rf build dist *.egg-info
