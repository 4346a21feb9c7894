# Each target first sees to it that the environment is there and up to date: see tools/setup_env.py.

VENV := $(or $(CGSPN_VENV),.venv)
BIN := $(VENV)/bin
CPP := $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu csrc/*/*.cuh tests/*/*.cpp)

# The interpreter that runs the set-up, which then looks for one that can carry the environment.
SETUP = python=$$(command -v python3 || command -v python3.12 || command -v python3.11) || { \
	  echo "No Python was found: install 3.11 or 3.12 (Debian, Ubuntu: apt install python3" \
	       "python3-venv python3-dev)." >&2; exit 1; }; \
	"$$python" tools/setup_env.py

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint format build clean

help: ## Show this list
	@echo "make demo and make test need nothing but Python 3.11 or 3.12 and a C++ compiler:"
	@sed -n 's/^\([a-z]*\):[^#]*## \(.*\)/  make \1 | \2/p' $(firstword $(MAKEFILE_LIST)) | \
	  awk -F '|' '{ printf "%-14s%s\n", $$1, $$2 }'

setup: ## Make the environment (.venv), or bring it up to date
	@$(SETUP)

demo: setup ## Train C-GSPN on mazes, with and without propagation, and compare
	@$(BIN)/python tools/demo.py

test: lint ## Run the linters, then the whole test suite
	@$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

lint: setup ## Check style and formatting
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/clang-format --dry-run -Werror $(CPP)

format: setup ## Mend what the linters can mend
	@$(BIN)/ruff check --fix-only .
	@$(BIN)/ruff format .
	@$(BIN)/clang-format -i $(CPP)

build: ## Compile the op anew
	@$(SETUP) --rebuild

clean: ## Remove what was compiled and cached; the environment and work_dirs stay
	@rm -rf build dist *.egg-info cgspn_seg/_C*.so .pytest_cache .ruff_cache .hypothesis
	@find . -name .venv -prune -o -name __pycache__ -prune -exec rm -rf {} +
