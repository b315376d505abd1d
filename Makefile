# Makefile of vddkcp. CONTRIBUTING.md explains the layout of the code.
GO         ?= go
PREFIX     ?= /usr/local
VERSION    ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo devel)
COMMIT     ?= $(shell git rev-parse HEAD 2>/dev/null)
SOURCE_DATE_EPOCH ?= $(shell git log -1 --format=%ct 2>/dev/null || echo 0)
STATICCHECK = honnef.co/go/tools/cmd/staticcheck@v0.8.2
GOVULNCHECK = golang.org/x/vuln/cmd/govulncheck@v1.9.0
FUZZTIME   ?= 20s
# TESTS is how many tests of a package run at a time. Most tests wait for other programs, so it is
# more than the number of processors of a small machine.
TESTS      ?= 4
FUZZLONG   ?= 1h

# Without cgo, bin/vddkcp is one static binary that runs on any Linux.
export CGO_ENABLED = 0

.PHONY: build testlib quick test test-race guests chaos fuzz fuzz-long bench lint vuln demo try dist install clean

build: bin/vddkcp

# The worker is a C program that loads VDDK. It is embedded in bin/vddkcp, on x86-64
# only, because VDDK exists only for x86-64.
WORKER = $(if $(filter x86_64,$(shell uname -m)),vddk/worker/bin/vddkcp-vddk-worker)
vddk/worker/bin/vddkcp-vddk-worker: vddk/worker/build $(wildcard vddk/worker/program/*)
	vddk/worker/build $@

# bin/vddkcp is always rebuilt: the go command itself knows what is out of date.
.PHONY: bin/vddkcp
bin/vddkcp: $(WORKER)
	$(GO) build -trimpath -buildvcs=false -ldflags '-s -w -X main.version=$(VERSION) -X main.commit=$(COMMIT)' -o $@ ./cmd/vddkcp

# testlib builds a stand-in for VMware's library (vddk/testlib/README.md).
testlib:
	./scripts/need gcc
	./vddk/testlib/build bin/testlib

# quick runs the tests that need neither other programs nor root, in under two minutes. It
# leaves out the slowest scripts of vddkcp.
quick:
	VDDKCP_CHAOS=0 $(GO) test -short ./...

test:
	./scripts/need gcc qemu-img qemu-io mke2fs mkfs.xfs mkfs.btrfs time qemu-nbd nbdkit nbdcopy nbd-client nbd-server vmdkinfo openssl debootstrap lintian rpm skopeo umoci
	$(GO) test -timeout 40m -parallel $(TESTS) ./...

# test-race runs the tests with the race detector, which needs cgo. It leaves out the
# tests of chaos, guests, clusters, packages and copies of VMs: they run programs that are built
# without the race detector, so make test covers them.
test-race:
	CGO_ENABLED=1 VDDKCP_CHAOS=0 $(GO) test -race -timeout 60m -parallel $(TESTS) -skip '^(TestExample(BootCheck|BootFirst|V2V|Slurm|KubernetesRuns)|TestGuestWritesToCowFile|TestBootFirstWithoutGuest|TestVM([A-Z][a-z]+)+(NFC[A-Za-z]*)?|TestVMsOfOneName|TestCheckOverNFC|TestHelpExamples|TestGuide|TestComingFrom|TestTry|TestCheckWithoutEncryption|TestPackages)$$' ./...

# guests runs libguestfs and virt-v2v against exports. It takes 15 minutes without KVM.
guests: build
	./scripts/guests $(GUEST)

# chaos runs a hundred copies of 2 GiB that are killed again and again. It takes about
# three hours.
chaos:
	VDDKCP_CHAOS=$${VDDKCP_CHAOS:-100} VDDKCP_CHAOS_SIZE=$${VDDKCP_CHAOS_SIZE:-2147483648} \
		$(GO) test -timeout 6h -run Chaos -v ./cmd/vddkcp

# fuzz checks that every fuzz target has committed seeds, and runs it for FUZZTIME.
fuzz:
	FUZZTIME=$(FUZZTIME) ./scripts/fuzz

# fuzz-long reads damaged qcow2 images for FUZZLONG and compares the result with
# qemu-img, and then runs every fuzz target for FUZZLONG.
fuzz-long:
	./scripts/need qemu-img qemu-io
	VDDKCP_REFEREE=$(FUZZLONG) $(GO) test -timeout 0 -run TestReferee -v ./source/qcow2
	FUZZTIME=$(FUZZLONG) ./scripts/fuzz

lint:
	test -z "$$(gofmt -l .)" || { gofmt -d .; exit 1; }
	$(GO) vet ./...
	$(GO) run ./internal/lint
	$(GO) run $(STATICCHECK) ./...
	$(GO) mod tidy -diff
	$(GO) -C testtools vet ./...
	$(GO) -C testtools mod tidy -diff

# vuln needs access to the Go vulnerability database.
vuln:
	$(GO) run $(GOVULNCHECK) ./...

demo: build
	./scripts/need qemu-img mke2fs
	./scripts/demo

# try opens a shell in which vddkcp works with a simulated vCenter server
# (docs/guide/without-vsphere.md). With VIA=vddk, the disks are read through a stand-in for VMware's
# library, which needs a C compiler.
VIA ?= nfc
try: build
	@PATH="$(CURDIR)/bin:$$PATH" $(GO) run ./vsphere/vspheretest/serve $(if $(filter nfc,$(VIA)),-nfc) -run ./scripts/try

bench: build
	./scripts/need qemu-img qemu-nbd nbdkit nbdcopy mke2fs time
	./scripts/bench

# dist writes the packages of a release into the folder dist (packaging/build). They are for
# amd64 too if the machine is another one, which then needs a cross compiler for the worker.
dist: build vddk/worker/bin/vddkcp-vddk-worker
	./scripts/need gcc dpkg-deb gzip
	VERSION='$(VERSION)' COMMIT='$(COMMIT)' SOURCE_DATE_EPOCH='$(SOURCE_DATE_EPOCH)' ./packaging/build dist

install: build
	./packaging/install '$(DESTDIR)' '$(PREFIX)'

clean:
	rm -rf bin dist bench-out vddk/worker/bin/vddkcp-vddk-worker
