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
SEED ?=
COVERAGE ?=
SUITES ?= cluster test
BREAK ?=
KEEP ?=
YES ?=
UV := uv==0.13.9
KIND := gitops-hook
VERSION := $(shell sed -n 's/^__version__ = "\(.*\)"$$/\1/p' gitops_hook.py)
# What kustomize puts on all that we install, since 0.1.0: a namespace without it belongs to others.
OURS := app.kubernetes.io/part-of=gitops-hook

VENV := .venv
INSTALLED := $(VENV)/.installed
BIN := $(VENV)/bin
KUBECTL ?= $(shell command -v kubectl || echo $(BIN)/kubectl)
HAS_KUBECTL = $(if $(filter $(BIN)/kubectl,$(KUBECTL)),$(INSTALLED))
LOCAL_IMAGE = $(or $(IMAGE),gitops-hook:dev)
# Two ways to end: nothing was tried, or what was tried failed.
die = { echo "make $@: $(1)" >&2; exit 2; }
fail = { echo "make $@: $(1)" >&2; exit 1; }
# What kustomize can do depends on the version of kubectl, so one that we installed is preferred.
KUSTOMIZE = $(or $(wildcard $(BIN)/kubectl),$(KUBECTL)) kustomize
# Seconds between two looks at a daemon that does not start, and until waiting for it ends.
LOOK := 5
PATIENCE := 180

export BREAK KEEP IMAGE CHECK_CONFIG OUTLINE CONTENTS PODS PROBLEMS
# Where this is set, every process compiles the program and the tests anew: minutes in each suite.
unexport PYTHONDONTWRITEBYTECODE

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
maps = [o for o in yaml.safe_load_all(sys.stdin) if o and o["kind"] == "ConfigMap"]
ours = [o.get("data") or {} for o in maps if o["metadata"]["name"] == gitops_hook.MANAGER]
try:
    gitops_hook.load_config("".join(data.get("config.yaml", "") for data in ours))
except gitops_hook.ConfigError as wrong:
    sys.exit("\n".join(gitops_hook.mask_value(wrong.faults, ())))
endef

# What is applied is the overlay with three values set: the image of the daemon, the same image in
# config.yaml for its Jobs, and the digest of all this, which restarts the daemon after a change.
# Make takes blanks and a dash from the beginning of a line.
define KUSTOMIZATION
apiVersion: kustomize.config.k8s.io/v1beta1
kind: Kustomization
resources: [rendered.yaml]
images: [{name: gitops-hook, newName: "$${IMAGE%:*}", newTag: "$${IMAGE##*:}"}]
configMapGenerator: [{name: make-apply, literals: ["digest=$$digest"], \
	options: {disableNameSuffixHash: true, annotations: {config.kubernetes.io/local-config: "true"}}}]
replacements: [ \
	{source: {kind: ConfigMap, name: make-apply, fieldPath: data.digest}, \
	targets: [{select: {kind: Deployment, name: gitops-hook, namespace: orchestration}, \
	fieldPaths: [spec.template.metadata.annotations.gitops-hook/applied]}]}, \
	{source: {kind: Deployment, name: gitops-hook, namespace: orchestration, \
	fieldPath: "spec.template.spec.containers.[name=gitops-hook].image"}, \
	targets: [{select: {kind: ConfigMap, name: gitops-hook, namespace: orchestration}, \
	fieldPaths: ["data.[config.yaml].images.hook"]}]}]
endef

define SET_IMAGE
digest=$$(sha256sum <<<"$$IMAGE $$rendered" | cut -c 1-16)
folder=$$(mktemp -d)
trap 'rm -rf "$$folder"' EXIT
cat >"$$folder/rendered.yaml" <<<"$$rendered"
cat >"$$folder/kustomization.yaml" <<END
$(KUSTOMIZATION)
END
applied=$$($(KUSTOMIZE) "$$folder" 2>"$$folder/why") || {
	why=$$(<"$$folder/why")
	[[ $$why != *"got ScalarNode"* ]] || \
		$(call die,kubectl is too old to set images.hook in config.yaml: 1.36 can; make venv installs one)
	[[ $$why == *images.hook* ]] || $(call die,kubectl kustomize cannot set the image: $$why)
	applied=
}
# !!null is what kustomize makes of a key without a value
[[ -n $$applied && $$applied != *'!!null'* ]] || \
	$(call die,config.yaml does not say images.hook: add  images: {hook: gitops-hook:dev}  as it stands)
endef

# What a daemon that does not start has in the cluster, for PROBLEMS to read.
define PODS
{{range .items}}
{{- if eq .kind "Deployment"}}
{{- if eq .metadata.name "gitops-hook"}}{{range .status.conditions}}
{{- if and (eq .type "ReplicaFailure") (eq .status "True")}}{{"problem\t\t"}}{{.message}}{{"\n"}}{{end}}
{{- end}}{{end}}
{{- else if eq .kind "Event"}}
{{- if eq .type "Warning"}}{{"event\t"}}{{.involvedObject.uid}}{{"\t"}}{{.reason}}: {{.message}}{{"\n"}}{{end}}
{{- else if not .metadata.deletionTimestamp}}
{{- $$uid := .metadata.uid}}{{"pod\t"}}{{$$uid}}{{"\t"}}{{.metadata.name}}{{"\t"}}
{{- with .metadata.annotations}}{{index . "gitops-hook/applied"}}{{end}}{{"\n"}}
{{- range .status.conditions}}{{if and (eq .type "PodScheduled") (eq .status "False")}}
{{- "problem\t"}}{{$$uid}}{{"\t"}}{{.reason}}: {{.message}}{{"\n"}}{{end}}{{end}}
{{- range .status.containerStatuses}}{{$$container := .name}}
{{- if or .state.running .restartCount}}{{"started\t"}}{{$$uid}}{{"\n"}}{{end}}
{{- with .state.terminated}}{{"problem\t"}}{{$$uid}}{{"\tcontainer "}}{{$$container}} ended with exit code {{.exitCode}}{{"\n"}}{{end}}
{{- with .state.waiting}}{{if not (or (eq .reason "ContainerCreating") (eq .reason "PodInitializing"))}}
{{- "problem\t"}}{{$$uid}}{{"\tcontainer "}}{{$$container}}: {{.reason}}: {{.message}}{{"\n"}}{{end}}{{end}}
{{- end}}
{{- end}}
{{- end}}
endef

# The cluster's own words about the pods of this digest: each line once. Warnings of a pod that has
# run before are no reason why it does not start: its probes are among them.
define PROBLEMS
BEGIN { FS = "\t" }
$$1 == "pod" && $$4 == digest { name[$$2] = $$3 }
$$1 == "started" { started[$$2] = 1 }
$$1 == "problem" && !$$2 { line = "deployment gitops-hook: " $$3 }
$$1 == "problem" && $$2 in name { line = "pod " name[$$2] ": " $$3 }
$$1 == "event" && $$2 in name && !($$2 in started) && $$3 !~ /^Failed: Error: / { line = "pod " name[$$2] ": " $$3 }
line && !seen[line]++ { gsub(/[^[:print:]]/, "?", line); print "  " line }
{ line = "" }
endef

LAST_WORDS = $(KUBECTL) -n orchestration logs deployment/gitops-hook --tail=20 >&2 || true

# A pod that has the same kind of trouble at two looks will not start by itself within seconds. Until
# the first one it may be the old pod that is waited for: it has a minute to end.
define WAIT_FOR_DAEMON
exec 3>&1
end=$$((SECONDS + $(PATIENCE)))
problems=
until why=$$($(KUBECTL) -n orchestration rollout status deployment/gitops-hook --timeout=$(LOOK)s 2>&1 >&3)
do
	before=$$problems
	problems=$$($(KUBECTL) -n orchestration get deployments,pods,events -o go-template="$$PODS" | \
		awk -v digest="$$digest" "$$PROBLEMS") || true
	if [[ -n $$problems && -n $$before ]]; then
		[[ $$problems != *CrashLoopBackOff* && $$problems != *"ended with"* ]] || $(LAST_WORDS)
		echo "$$problems" >&2
		$(call fail,everything is applied but the daemon does not start; above is what the cluster says)
	elif [[ $$why != *"timed out"* ]] || ((SECONDS >= end)); then
		echo "$$why" >&2
		$(LAST_WORDS)
		$(call fail,everything is applied but the daemon is not ready; above are the last lines of its log \
			and this tells of its pod: kubectl -n orchestration describe pods -l app=gitops-hook)
	fi
done
endef

# What kustomize prints has top-level keys at the margin, and what is in `metadata` behind two blanks.
# Of each object: its number, kind, namespace, name, whose it is by our label, whether it stays.
define OUTLINE
function tell() {
	if (kind) print number + 0, kind, space, name, part, keep
	number++
	kind = ""
	space = name = part = keep = "-"
}
BEGIN { space = name = part = keep = "-" }
{ gsub(/["\047]/, "") }
/^---$$/ { tell(); next }
/^[a-zA-Z]/ { top = $$1 }
/^kind: / { kind = $$2 }
top == "metadata:" && /^  name: / { name = $$2 }
top == "metadata:" && /^  namespace: / { space = $$2 }
top == "metadata:" && /^    app.kubernetes.io\/part-of: / { part = $$2 }
top == "metadata:" && /^    gitops-hook\/uninstall: / { keep = $$2 }
END { tell() }
endef

# Counts what is in a namespace by kind and by whose it is, and names what neither we nor the cluster
# put there. Columns: kind, name, owner, our two labels, who wrote it first.
define CONTENTS
function count(whose) {
	if (!($$1 in kinds)) { kinds[$$1]; order[++many] = $$1 }
	counted[whose, $$1]++
}
function tell(whose, end,   i, line) {
	for (i = 1; i <= many; i++) if ((whose, order[i]) in counted)
		line = line (line ? ", " : "") counted[whose, order[i]] " " order[i]
	if (line) print "  " whose ": " line end
}
{ gsub(/[^[:print:]]/, "?") }
$$1 "/" $$2 ~ /^(ServiceAccount\/default|ConfigMap\/kube-root-ca\.crt)$$/ { next }
$$3 != "<none>" { count("that these own"); next }
$$4 == "gitops-hook" { count("installed by make apply"); next }
$$5 == "gitops-hook" { count("made by the daemon"); next }
{
	count("made by others")
	if (++others > 20) next
	who = $$0
	for (i = 1; i <= 5; i++) sub(/^ *[^ ]+ */, "", who)
	named = named (named ? ", " : "") $$1 "/" $$2 " (" substr(who, 1, 40) ")"
}
END {
	tell("installed by make apply")
	tell("made by the daemon")
	tell("made by others", ": " named (others > 20 ? " and more" : ""))
	tell("that these own")
}
endef

META := .metadata
COLUMNS := K:.kind,N:$(META).name,O:$(META).ownerReferences[0].name,P:$(META).labels.app\.kubernetes\.io/part-of
COLUMNS := $(COLUMNS),M:$(META).labels.app\.kubernetes\.io/managed-by,W:$(META).managedFields[0].manager

# Which of the overlay's namespaces there are in the cluster, whose they are and how they stand.
define LOOK_AT_NAMESPACES
there=
outline=$$(awk "$$OUTLINE" <<<"$$rendered")
names=$$(awk '$$2 == "Namespace" { print $$4 }' <<<"$$outline")
[[ -z $$names ]] || there=$$($(KUBECTL) get namespaces $$names --ignore-not-found --no-headers -o \
	'custom-columns=N:.metadata.name,P:.metadata.labels.app\.kubernetes\.io/part-of,S:.status.phase') || \
	$(call die,the namespaces cannot be looked at (kubectl says why above); nothing was changed)
endef

# A namespace that others made keeps its quota, its policies and its Pod Security level.
define REFUSE_NAMESPACES
refused=$$(awk '$$2 == "Namespace" && $$5 != "gitops-hook" {
	print "namespace " $$4 " of the overlay lacks the label $(OURS), which the base puts on it" }' <<<"$$outline")
while read -r name part phase; do
	if [[ -n $$name && $$part != gitops-hook ]]; then
		refused+=$$'\n'"namespace $$name exists and was not made by make apply: it lacks the label $(OURS)."
		if [[ $$name == orchestration ]]; then
			refused+=" That name is fixed in the program, so this cluster has no room for it, unless"
		else
			refused+=" Choose another name in namespaces.yaml of your overlay (manifests/example/ has one); or"
		fi
		refused+=" you hand it over with all that is in it: kubectl label namespace $$name $(OURS)"
	elif [[ $$phase == Terminating ]]; then
		refused+=$$'\n'"namespace $$name is still being deleted; try again when it is gone"
	fi
done <<<"$$there"
[[ -z $$refused ]] || {
	sed '/^$$/d; s/^/make $@: /' <<<"$$refused" >&2
	$(call die,nothing was applied)
}
endef

.PHONY: help venv demo test cluster coverage e2e faults soak format lint types check bench screenshots fuzz image apply delete kind lock clean

# With COVERAGE=1, each Python that the tests start says what it ran when it ends (`coverage` put a
# hook for that into the environment).
MEASURED = $(if $(COVERAGE),COVERAGE_PROCESS_START='$(CURDIR)/pyproject.toml' COVERAGE_FILE='$(CURDIR)/.coverage')

SHUFFLED = $(if $(SEED),--random-order-seed $(SEED))

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z0-9]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

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

test: $(INSTALLED) ## Run the quick tests, which take a minute or two (ARGS='-k webhook -x', SEED=7: in random order)
	@$(MEASURED) $(BIN)/python -m pytest -m 'not cluster' -n 3 --dist loadfile $(SHUFFLED) $(ARGS)

cluster: $(INSTALLED) ## Run the slow tests: the daemon on the stand-in cluster, and that itself
	@$(MEASURED) $(BIN)/python -m pytest -m cluster -n 2 --dist loadfile $(SHUFFLED) $(ARGS)

coverage: $(INSTALLED) ## Measure which branches both suites run (SUITES= only reports)
	@for suite in $(SUITES); do $(MAKE) $$suite COVERAGE=1; done
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

E2E := $(patsubst %,tests/e2e/test_%.py,demo intake page switches upgrade memory)

e2e: $(INSTALLED) ## Run the demo as users do; try the page in chromium; kill the intake; upgrade; measure memory
	@$(BIN)/python -m pytest $(E2E) $(ARGS)

faults: $(INSTALLED) ## Every step of a deployment with every kind of trouble (ARGS='-m short': one of each)
	@$(BIN)/python -m pytest tests/e2e/test_faults.py tests/e2e/test_pairs.py $(ARGS)

soak: $(INSTALLED) ## Announce 1,000 pushes while all kinds of passing trouble come and go (ARGS='-m short': 60)
	@$(BIN)/python -m pytest tests/e2e/test_soak.py $(ARGS)

format: $(INSTALLED) ## Format the code, and repair what ruff can repair
	@left=0
	$(BIN)/ruff check --fix . || left=$$?
	$(BIN)/ruff format .
	exit $$left

lint: $(INSTALLED) ## Check style and common mistakes
	@$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet . || $(call die,the files above are not formatted; make format does it)

types: $(INSTALLED) ## Check the types
	@$(BIN)/mypy

check: lint types test cluster ## Everything that must pass before a commit

bench: $(INSTALLED) ## Measure, print a table, write bench.json
	@$(BIN)/python -m tests.bench $(ARGS)

screenshots: $(INSTALLED) ## Take the pictures of the page in docs/, with chromium
	@$(BIN)/python -m tests.screenshots

fuzz: $(INSTALLED) ## Feed the parsers what nobody would send
	@$(BIN)/python -m tests.fuzz $(ARGS)

image: ## Build the image (IMAGE=registry/name:tag, else gitops-hook:dev)
	@command -v docker >/dev/null || $(call die,docker is missing; it builds the image)
	docker info >/dev/null 2>&1 || $(call die,the docker command is here but reaches no docker engine; start one)
	docker build --build-arg VERSION=$(VERSION) --build-arg REVISION="$$(git rev-parse HEAD 2>/dev/null || true)" \
		--tag "$(LOCAL_IMAGE)" .

# The same input gives the same objects, and the second run changes nothing. A healthy daemon is not
# replaced by one that a wrong configuration would end.
apply: $(HAS_KUBECTL) ## Install or update (IMAGE=registry/name:tag, OVERLAY=path/to/overlay)
	@name='^[a-zA-Z0-9][a-zA-Z0-9._/:@-]*'
	if [[ ! $$IMAGE =~ $$name[:@][a-zA-Z0-9._:-]+$$ ]]; then
		[[ ! $$IMAGE =~ $$name$$ ]] || $(call die,IMAGE=$$IMAGE has no tag; add the version: $$IMAGE:$(VERSION))
		$(call die,say which image: make apply IMAGE=registry.example.com/tools/gitops-hook:$(VERSION))
	fi
	$(CHECK_OVERLAY)
	rendered=$$($(KUBECTL) kustomize '$(OVERLAY)')
	if $(BIN)/python -c 'import gitops_hook' 2>/dev/null; then
		$(BIN)/python -c "$$CHECK_CONFIG" <<<"$$rendered" || \
			$(call die,the configuration is not valid; nothing was applied)
	else
		echo "make $@: the configuration is not checked: that takes what make venv installs"
	fi
	$(SET_IMAGE)
	$(SAY_CONTEXT)
	$(LOOK_AT_NAMESPACES)
	$(REFUSE_NAMESPACES)
	$(KUBECTL) apply -f - <<<"$$applied"
	why=$$($(KUBECTL) -n orchestration get secret gitops-hook-secrets -o name 2>&1 >/dev/null) || \
		[[ $$why == *Forbidden* ]] || {
		echo "$$why" >&2
		$(call fail,everything is applied; the daemon waits for its Secret: see manifests/example/secrets.example)
	}
	$(WAIT_FOR_DAEMON)

# Only namespaces that carry our label go; in one that others made nothing is touched. What kubectl
# cannot list goes all the same, so that is said.
delete: $(HAS_KUBECTL) ## Uninstall; staging and production keep running (OVERLAY= as applied, YES=1 does not ask)
	@$(CHECK_OVERLAY)
	rendered=$$($(KUBECTL) kustomize '$(OVERLAY)')
	$(SAY_CONTEXT)
	$(LOOK_AT_NAMESPACES)
	[[ -z $$names || -n $$there ]] || { echo "make $@: none of its namespaces is in this cluster"; exit 0; }
	kinds=$$($(KUBECTL) api-resources --namespaced --verbs=list -o name | \
		grep -vE '^(events|endpoints|endpointslices)(\.|$$)|\.metrics\.k8s\.io$$' | paste -sd,) || true
	foreign=
	while read -r name part phase; do
		keep=$$(awk -v name="$$name" '$$2 == "Namespace" && $$4 == name { print $$6 }' <<<"$$outline")
		if [[ -n $$name && $$part != gitops-hook ]]; then
			foreign+=" $$name"
			echo "namespace $$name was not made by make apply: it stays, and nothing in it is touched"
		elif [[ $$keep == keep ]]; then
			echo "namespace $$name stays, with the applications in it; the daemon's permissions there go"
		elif [[ -n $$name ]]; then
			echo "namespace $$name goes, with all that is in it:"
			$(KUBECTL) -n "$$name" get "$$kinds" --ignore-not-found --no-headers \
				-o 'custom-columns=$(COLUMNS)' | sort | awk "$$CONTENTS" || \
				echo "  and what could not be listed (kubectl says why above)"
		fi
	done <<<"$$there"
	if [[ "$(YES)" != 1 ]]; then
		[[ -t 0 ]] || $(call die,nothing was deleted: there is no terminal to ask on; if all this may go: make delete YES=1)
		read -rp "make $@: delete all this? [y/N] " answer || true
		[[ $${answer:-} =~ ^[yY] ]] || $(call die,nothing was deleted)
	fi
	drop=$$(awk -v foreign="$$foreign " '{ space = $$2 == "Namespace" ? $$4 : $$3 }
		index(foreign, " " space " ") { print $$1 }' <<<"$$outline" | xargs)
	awk -v drop=" $$drop " '/^---$$/ { number++ } !index(drop, " " number + 0 " ")' <<<"$$rendered" | \
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
	# for the Secret; with the label, without which make apply would refuse it
	label=$(OURS)
	$$kubectl get namespace orchestration -o name || $$kubectl create -f - <<<"{apiVersion: v1, kind: Namespace, \
		metadata: {name: orchestration, labels: {$${label/=/: }}}}"
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
	@rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage* bench.json
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
