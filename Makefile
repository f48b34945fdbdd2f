# `make` lists what there is to do.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.ONESHELL:
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory --warn-undefined-variables

PYTHON ?= python3
OVERLAY ?= manifests/
IMAGE ?=
ARGS ?=
BREAK ?=
KEEP ?=
UV := uv==0.13.9
KIND := gitops-hook

VENV := .venv
INSTALLED := $(VENV)/.installed
BIN := $(VENV)/bin
KUBECTL ?= $(shell command -v kubectl || echo $(BIN)/kubectl)
HAS_KUBECTL = $(if $(filter $(BIN)/kubectl,$(KUBECTL)),$(INSTALLED))
LOCAL_IMAGE = $(or $(IMAGE),gitops-hook:dev)
die = { echo "make $@: $(1)" >&2; exit 2; }

export BREAK KEEP IMAGE CHECK_CONFIG

# Nothing on the command line says it, and with several clusters it may be the wrong one.
define SAY_CONTEXT
context=$$($(KUBECTL) config view --minify -o 'jsonpath={.current-context}' 2>/dev/null) || {
	context="none$${KUBERNETES_SERVICE_HOST:+ (in-cluster)}"
}
echo "make $@: kubectl context: $$context"
endef

define CHECK_OVERLAY
why=$$($(KUBECTL) kustomize '$(OVERLAY)' 2>&1 >/dev/null) || \
	$(call die,OVERLAY=$(OVERLAY) is no folder with a kustomization that works: $$(tail -n 1 <<<"$$why" | \
		sed -E 's/^(error: |E[0-9]{4} .*"command failed" err=")//; s/"$$//'))
endef

define CHECK_CONFIG
import gitops_hook, sys, yaml
found = [o for o in yaml.safe_load_all(sys.stdin) if o and o["kind"] == "ConfigMap"]
ours = [o.get("data") or {} for o in found if o["metadata"]["name"] == gitops_hook.MANAGER]
try:
    gitops_hook.load_config("".join(data.get("config.yaml", "") for data in ours))
except gitops_hook.ConfigError as wrong:
    sys.exit("\n".join(gitops_hook.without(wrong.faults, ())))
endef

.PHONY: help venv demo test cluster e2e faults lint types check bench fuzz image apply delete kind lock clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z0-9]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

venv: $(INSTALLED) ## Make the virtual environment from the hash-locked requirements

$(INSTALLED): requirements-dev.txt
	@command -v git >/dev/null || $(call die,git is missing; install it first)
	command -v $(PYTHON) >/dev/null || $(call die,$(PYTHON) is missing; Python 3.11 or newer is needed)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		$(call die,$(PYTHON) is $$($(PYTHON) -V); 3.11 or newer is needed (make PYTHON=python3.12 …))
	$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		$(call die,$(PYTHON) has no venv module; on Debian and Ubuntu install python3-venv)
	echo "making $(VENV) from $<"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--require-hashes --only-binary :all: -r $<
	touch $@

demo: $(INSTALLED) ## Watch pushes being tested, built, switched and switched back (KEEP=1 leaves it running)
	@$(BIN)/python -m tests.demo

test: $(INSTALLED) ## Run the tests that take a minute (ARGS='-k webhook -x')
	@$(BIN)/python -m pytest -m 'not cluster' -n 2 --dist loadfile $(ARGS)

cluster: $(INSTALLED) ## Run the tests that take minutes: the daemon on the stand-in cluster, and that itself
	@$(BIN)/python -m pytest -m cluster -n 3 --dist loadfile $(ARGS)

e2e: $(INSTALLED) ## Run the demo as its users do, sabotaged and interrupted; kill the intake of 500 pushes
	@$(BIN)/python -m pytest tests/e2e/test_demo.py tests/e2e/test_intake.py -n 2 $(ARGS)

faults: $(INSTALLED) ## Every step of a deployment with every kind of trouble (ARGS='-m short': one of each)
	@$(BIN)/python -m pytest tests/e2e/test_faults.py tests/e2e/test_pairs.py $(ARGS)

lint: $(INSTALLED) ## Check style and common mistakes
	@$(BIN)/ruff check .

types: $(INSTALLED) ## Check the types
	@$(BIN)/mypy

check: lint types test cluster ## Everything that must pass before a commit

bench: $(INSTALLED) ## Measure, print a table, write bench.json
	@$(BIN)/python -m tests.bench $(ARGS)

fuzz: $(INSTALLED) ## Feed the parsers what nobody would send
	@$(BIN)/python -m tests.fuzz $(ARGS)

image: ## Build the image (IMAGE=registry/name:tag, else gitops-hook:dev)
	@command -v docker >/dev/null || $(call die,docker is missing; it builds the image)
	docker info >/dev/null 2>&1 || $(call die,the docker command is here but reaches no docker engine; start one)
	docker build --build-arg REVISION="$$(git rev-parse HEAD 2>/dev/null || true)" --tag "$(LOCAL_IMAGE)" .

# The same input gives the same objects, and the second run changes nothing. The digest in the
# Deployment restarts the daemon when anything that was applied changed, its configuration above all.
# A healthy daemon is not replaced by one that a wrong configuration would end.
apply: $(HAS_KUBECTL) ## Install or update (IMAGE=registry/name:tag, OVERLAY=path/to/overlay)
	@name='^[a-zA-Z0-9][a-zA-Z0-9._/:@-]*'
	if [[ ! $$IMAGE =~ $$name[:@][a-zA-Z0-9._:-]+$$ ]]; then
		[[ ! $$IMAGE =~ $$name$$ ]] || $(call die,IMAGE=$$IMAGE has no tag; add the version: $$IMAGE:1.0.0)
		$(call die,say which image: make apply IMAGE=registry.example.com/tools/gitops-hook:1.0.0)
	fi
	$(CHECK_OVERLAY)
	rendered=$$($(KUBECTL) kustomize '$(OVERLAY)' | \
		sed -E "s#(^|[^a-zA-Z0-9._/-])gitops-hook:dev($$|[^a-zA-Z0-9._-])#\1$(IMAGE)\2#g")
	if $(BIN)/python -c 'import gitops_hook' 2>/dev/null; then
		$(BIN)/python -c "$$CHECK_CONFIG" <<<"$$rendered" || \
			$(call die,the configuration is not valid; nothing was applied)
	else
		echo "make $@: the configuration is not checked: that takes what make venv installs"
	fi
	grep -qE "^([^#]*[ {,])?['\"]?hook['\"]?: *[^ ]" <<<"$$rendered" || \
		$(call die,config.yaml does not say images.hook: add  images: {hook: gitops-hook:dev}  as it stands)
	digest=$$(sha256sum <<<"$$rendered" | cut -c 1-16)
	$(SAY_CONTEXT)
	$(KUBECTL) apply -f - <<<"$${rendered//digest-of-what-was-applied/$$digest}"
	$(KUBECTL) -n orchestration get secret gitops-hook-secrets -o name >/dev/null || \
		$(call die,everything is applied; the daemon waits for its Secret: see manifests/example/secrets.example)
	$(KUBECTL) -n orchestration rollout status deployment/gitops-hook --timeout=180s || {
		$(KUBECTL) -n orchestration logs deployment/gitops-hook --tail=20 >&2 || true
		$(call die,everything is applied but the daemon is not ready; above are the last lines of its log \
			and this tells of its pod: kubectl -n orchestration describe pods -l app=gitops-hook)
	}

delete: $(HAS_KUBECTL) ## Uninstall; staging and production keep running, without the daemon (OVERLAY= as applied)
	@$(CHECK_OVERLAY)
	$(SAY_CONTEXT)
	echo "deleting the namespaces orchestration, test and build with all that is in them, whoever made it,"
	echo "and the daemon's permissions in staging and production"
	$(KUBECTL) kustomize '$(OVERLAY)' | \
		$(KUBECTL) delete -f - --selector 'gitops-hook/uninstall!=keep' --ignore-not-found

kind: ## Try it on a kind cluster: make one, load the image, apply
	@missing=$$(for tool in docker kind; do command -v $$tool >/dev/null || echo -n " $$tool"; done)
	[[ -z $$missing ]] || $(call die,missing here:$$missing (https://kind.sigs.k8s.io tells how to install them))
	docker info >/dev/null 2>&1 || $(call die,the docker command is here but reaches no docker engine; start one)
	kind get clusters | grep -qx $(KIND) || kind create cluster --name $(KIND) --wait 120s
	$(MAKE) image IMAGE='$(LOCAL_IMAGE)'
	# by its content: a name that stays the same would not restart the daemon
	id=$$(docker image inspect --format '{{.Id}}' '$(LOCAL_IMAGE)') && image=gitops-hook:$${id:7:12}
	docker tag '$(LOCAL_IMAGE)' "$$image"
	kind load docker-image "$$image" --name $(KIND)
	$(if $(HAS_KUBECTL),$(MAKE) venv)
	kubectl='$(KUBECTL) --context kind-$(KIND)'
	$$kubectl create namespace orchestration --dry-run=client -o yaml | $$kubectl apply -f -
	$$kubectl -n orchestration get secret gitops-hook-secrets -o name || \
		printf 'whsec_%s\n' "$$(head -c 32 /dev/urandom | base64)" | $$kubectl -n orchestration \
			create secret generic gitops-hook-secrets --from-file=webhook-signing-tokens=/dev/stdin
	$(MAKE) apply IMAGE="$$image" KUBECTL="$$kubectl"

lock: $(INSTALLED) ## Pin what *.in asks for, with hashes (ARGS=--upgrade for newer versions)
	@$(BIN)/uv --version 2>/dev/null | grep -q '^uv $(UV:uv==%=%)' || \
		$(BIN)/python -m pip install --quiet --only-binary :all: '$(UV)'
	for name in requirements requirements-dev; do
		$(BIN)/uv pip compile --quiet --no-config --universal --python-version 3.11 --generate-hashes \
			--custom-compile-command 'make lock' $(ARGS) $$name.in --output-file $$name.txt
	done

clean: ## Remove what the other targets made
	@rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage bench.json
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
