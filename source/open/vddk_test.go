package open_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/vddkcp/vddkcp/internal/peer"
	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/source/open"
	"github.com/vddkcp/vddkcp/source/sourcetest"
	"github.com/vddkcp/vddkcp/vddk"
)

// fakeVDDK opens disks in memory, and records the parameters and options that the
// library would get.
type fakeVDDK struct {
	params  vddk.Params
	options vddk.Options
	opened  int
	err     error
}

func (f *fakeVDDK) open(_ context.Context, p vddk.Params, l vddk.Library, o vddk.Options) (source.Disk, error) {
	f.opened++
	f.params, f.options = p, o
	if f.err != nil {
		return nil, f.err
	}
	if strings.HasSuffix(p.File, "empty.vmdk") {
		return &sourcetest.Memory{}, nil
	}
	return &sourcetest.Memory{Bytes: make([]byte, 4096)}, nil
}

func TestVDDKAddresses(t *testing.T) {
	peer.Need(t, "gcc")
	lib := filepath.Join(t.TempDir(), "libvixDiskLib.so.8")
	code := filepath.Join(t.TempDir(), "lib.c")
	if err := os.WriteFile(code, []byte("void f(void) {}"), 0o644); err != nil {
		t.Fatal(err)
	}
	peer.Run(t, "gcc", "-shared", "-nostdlib", "-o", lib, code)
	login := vddk.Params{Server: "localhost", Port: 1, User: "u", Password: vddk.NewSecret("hunter2"), VM: "moref=1", Thumbprint: strings.Repeat("ab", 20), LibDir: lib}
	without := func(change func(*vddk.Params)) vddk.Params {
		p := login
		change(&p)
		return p
	}
	for name, c := range map[string]struct {
		address, format string
		params          vddk.Params
		request         int
		openErr         error
		file            string // that VDDK is to open
		fails           string
		usage           bool
		hint            bool
	}{
		"a local disk":           {address: "vddk:/vm.vmdk", params: vddk.Params{LibDir: lib}, file: "/vm.vmdk"},
		"as raw":                 {address: "vddk:/vm.vmdk", format: "raw", params: vddk.Params{LibDir: lib}, file: "/vm.vmdk"},
		"on a server":            {address: "[ds] a b/c.vmdk ", params: login, file: "[ds] a b/c.vmdk "},
		"an absolute path there": {address: "vddk:/vmfs/c.vmdk", params: login, file: "/vmfs/c.vmdk"},
		"as VMDK":                {address: "vddk:/vm.vmdk", format: "vmdk", params: vddk.Params{LibDir: lib}, fails: "read as a raw disk", usage: true},
		"empty, as raw":          {address: "vddk:/empty.vmdk", format: "raw", params: vddk.Params{LibDir: lib}, file: "/empty.vmdk"},
		"requests too large":     {address: "vddk:/vm.vmdk", request: 4 << 20, params: vddk.Params{LibDir: lib}, fails: "at most 2MiB", usage: true},
		"relative":               {address: "vddk:vm.vmdk", params: vddk.Params{LibDir: lib}, fails: "absolute path"},
		"no server":              {address: "[ds] a.vmdk", params: vddk.Params{LibDir: lib}, fails: "[ds] a.vmdk: missing: --server, ", hint: true},
		"missing before library": {address: "[ds] a.vmdk", params: vddk.Params{LibDir: "/nowhere"}, fails: "missing: --server, ", hint: true},
		"no library":             {address: "vddk:/vm.vmdk", params: vddk.Params{LibDir: "/nowhere"}, fails: "vddk:/vm.vmdk: no VDDK library found", hint: true},
		"library before server":  {address: "[ds] a.vmdk", params: without(func(p *vddk.Params) { p.LibDir = "/nowhere" }), fails: "no VDDK library found", hint: true},
		"an error of the disk":   {address: "vddk:/vm.vmdk", params: vddk.Params{LibDir: lib}, openErr: errors.New("boom"), fails: "vddk:/vm.vmdk: boom"},
		"one that names it":      {address: "vddk:/vm.vmdk", params: vddk.Params{LibDir: lib}, openErr: errors.New("open /vm.vmdk: boom"), fails: "open /vm.vmdk: boom"},
	} {
		t.Run(name, func(t *testing.T) {
			fake := &fakeVDDK{err: c.openErr}
			o := &open.Opener{
				Retry: source.RetryOptions{Retries: 7},
				VDDK: &open.VDDK{
					Params: func(_ context.Context, file string) (vddk.Params, error) {
						c.params.File = file
						return c.params, nil
					},
					Options: vddk.Options{RequestSize: c.request},
					Open:    fake.open,
				},
			}
			d, err := o.Open(t.Context(), c.address, c.format)
			if c.fails == "" {
				if err != nil {
					t.Fatal(err)
				}
				defer d.Close()
				if fake.params.File != c.file || fake.options.Retry.Retries != 7 {
					t.Errorf("%+v %+v", fake.params, fake.options)
				}
				through, ok := source.Ability[open.ThroughVDDK](d)
				if !ok || through.Library().Path != lib || through.Params().File != c.file {
					t.Errorf("%v %+v", ok, through)
				}
				return
			}
			if err == nil || !strings.Contains(err.Error(), c.fails) || strings.Contains(fmt.Sprint(err), "hunter2") {
				t.Fatalf("%v, want %q", err, c.fails)
			}
			if strings.Count(err.Error(), strings.TrimPrefix(c.address, "vddk:")) > 1 {
				t.Errorf("%v: stutters", err)
			}
			var usage *open.UsageError
			if errors.As(err, &usage) != c.usage {
				t.Errorf("%T", err)
			}
			var hinted interface{ Hint() string }
			if c.hint && (!errors.As(err, &hinted) || hinted.Hint() == "") {
				t.Error("no hint")
			}
			if c.openErr == nil && fake.opened > 0 {
				t.Error("it was opened")
			}
		})
	}
}
