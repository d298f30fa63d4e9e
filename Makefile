# One target per thing a person does here; `make` alone lists them. CI calls the
# same ones (.ci/run).

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.NOTPARALLEL:

FUZZTIME ?= 20s

GUEST := .cache/guest

# Packages whose bugs hide in the order of goroutines.
RACE := $(patsubst %,./%/...,$(wildcard block internal/clock lease vmfs thinprov nbd hypervisor datastore store))
# Tests of real peers and real guests live beside the code they test.
E2E := $(patsubst %,./%/...,$(wildcard e2e hypervisor nbd))

# An older Go fetches the release that go.mod names. Debian's Go and the Go
# container images switch that off, so it is switched on here; a release chosen
# in the environment is kept.
ifeq (,$(filter-out local,$(GOTOOLCHAIN)))
export GOTOOLCHAIN := auto
endif
export PATH := $(PATH):/usr/sbin:/sbin
# No C anywhere but in the race detector.
export CGO_ENABLED := 0
# The build's commit goes into the binary wherever git can tell it.
VCS = $(shell git rev-parse -q --verify HEAD >/dev/null 2>&1 && echo true || echo false)
BUILD = go build -trimpath -buildvcs=$(VCS)

.PHONY: help
help:
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: build
build: packages-go ## the static binary bin/basalt
	$(BUILD) -o bin/basalt ./cmd/basalt

.PHONY: demo
demo: build packages-e2e guest ## a guided run with real guests (KEEP=1 keeps what it made)
	$(BUILD) -o bin/demo ./e2e/demo
	bin/demo

.PHONY: test
test: packages-go packages-race ## all tests that need no guest, under the race detector
	CGO_ENABLED=1 go test -race -timeout 15m ./...
	go test -timeout 5m ./thinprov # more seeds than fit under the race detector

.PHONY: e2e
e2e: build packages-e2e guest ## tests with real guests and real peers, one package at a time
	go test -tags e2e -count=1 -timeout 40m -p 1 -v $(E2E)

.PHONY: race
race: packages-go packages-race ## the concurrent packages again, on 1, 4 and 16 threads
	CGO_ENABLED=1 go test -race -count=1 -cpu 1,4,16 -timeout 30m $(RACE)

.PHONY: lint
lint: packages-go ## gofmt, vet, staticcheck, errcheck, floors and habits
	@files=$$("$$(go env GOROOT)/bin/gofmt" -l $$(find . -name '.?*' -prune -o -name '*.go' -print)); \
	[[ -z $$files ]] || { printf 'not formatted by gofmt:\n%s\n' "$$files" >&2; exit 1; }
	go vet ./...
	go vet -tags e2e ./...
	go tool staticcheck ./...
	go tool staticcheck -tags e2e ./...
	go tool errcheck -ignoretests -exclude .errcheck ./...
	go test ./internal/archtest

.PHONY: fuzz
fuzz: packages-go ## every fuzz target for FUZZTIME (20s)
	@listed=$$(go test -list '^Fuzz' ./fuzz) || { echo "$$listed" >&2; exit 1; }; \
	for target in $$(grep '^Fuzz' <<<"$$listed"); do \
		echo "== $$target, $(FUZZTIME)"; \
		go test -run '^$$' -fuzz "^$$target\$$" -fuzztime $(FUZZTIME) ./fuzz; \
	done

.PHONY: clean
clean: ## removes bin and the test guest
	rm -rf bin $(GUEST)

# The test guest's kernel is a Debian package that the tool downloads once; the
# lists must be fresh then, or the mirror may no longer have what they name.
.PHONY: guest
guest: packages-go packages-e2e
	@compgen -G '$(GUEST)/linux-image-*/boot/vmlinuz-*' >/dev/null || scripts/packages lists
	go run ./e2e/guest/mkinitrd -cache $(GUEST)

# The one place that installs anything: what is missing of a set of programs.
packages-%:
	@scripts/packages $*
