package vddk_test

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/vddkcp/vddkcp/vddk"
)

func TestValidate(t *testing.T) {
	remote := vddk.Params{File: "[ds] vm/vm.vmdk", Server: "esxi", User: "root", Password: vddk.NewSecret("hunter2"), VM: "moref=2"}
	local := vddk.Params{File: "/vm.vmdk"}
	with := func(p vddk.Params, change func(*vddk.Params)) vddk.Params {
		change(&p)
		return p
	}
	for name, c := range map[string]struct {
		p     vddk.Params
		fails string
	}{
		"remote":                 {p: remote},
		"local":                  {p: local},
		"a cookie":               {p: with(remote, func(p *vddk.Params) { p.Password, p.Cookie = vddk.Secret{}, vddk.NewSecret("c") })},
		"an empty password":      {p: with(remote, func(p *vddk.Params) { p.Password = vddk.NewSecret("") })},
		"an absolute path there": {p: with(remote, func(p *vddk.Params) { p.File = "/vmfs/volumes/ds/vm.vmdk" })},
		"spaces, quotes, UTF-8":  {p: with(remote, func(p *vddk.Params) { p.File = `[ds (3)] ö [x]/"a" 'b';.vmdk ` })},
		"a domain":               {p: with(remote, func(p *vddk.Params) { p.User = `DOMAIN\user` })},
		"user@domain":            {p: with(remote, func(p *vddk.Params) { p.User = "user@vsphere.local" })},
		"an IPv6 address":        {p: with(remote, func(p *vddk.Params) { p.Server = "fe80::1%eth0" })},
		"all else": {p: with(remote, func(p *vddk.Params) {
			p.Port, p.NFCHostPort, p.Compression, p.Transports, p.Snapshot, p.Thumbprint = 443, 902, "fastlz", "nbdssl:other", "snapshot-1", strings.Repeat("ab", 32)
		})},
		"buffers":                  {p: with(local, func(p *vddk.Params) { p.NFCBuffers = vddk.NFCBuffers{Size: 2 << 20, Count: 8} })},
		"nothing":                  {fails: "no disk is named"},
		"a relative path":          {p: vddk.Params{File: "vm.vmdk"}, fails: "VDDK opens a local VMDK by its absolute path only"},
		"a datastore alone":        {p: vddk.Params{File: "[ds] vm.vmdk"}, fails: "missing: --server, --user, --password or --cookie, --vm"},
		"no VM":                    {p: with(remote, func(p *vddk.Params) { p.VM = "" }), fails: "missing: --vm"},
		"no user, no secret":       {p: with(remote, func(p *vddk.Params) { p.User, p.Password = "", vddk.Secret{} }), fails: "missing: --user, --password or --cookie"},
		"no disk":                  {p: with(remote, func(p *vddk.Params) { p.File = "" }), fails: "missing: the disk (file=)"},
		"a server alone":           {p: vddk.Params{File: "/vm.vmdk", Server: "esxi"}, fails: "missing: --user, --password or --cookie, --vm"},
		"a user alone":             {p: vddk.Params{File: "/vm.vmdk", User: "root"}, fails: "missing: --server, --password or --cookie, --vm"},
		"a snapshot alone":         {p: vddk.Params{File: "/vm.vmdk", Snapshot: "s"}, fails: "missing: --server"},
		"a VM without moref":       {p: with(remote, func(p *vddk.Params) { p.VM = "vm-16" }), fails: `--vm: "vm-16": expected moref=ID`},
		"an empty moref":           {p: with(remote, func(p *vddk.Params) { p.VM = "moref=" }), fails: "expected moref=ID"},
		"a URL":                    {p: with(remote, func(p *vddk.Params) { p.Server = "https://esxi/" }), fails: `--server: "https://esxi/"`},
		"a server with a port":     {p: with(remote, func(p *vddk.Params) { p.Server = "esxi:443" }), fails: "--server: "},
		"brackets":                 {p: with(remote, func(p *vddk.Params) { p.Server = "[::1]" }), fails: "--server: "},
		"a user in the server":     {p: with(remote, func(p *vddk.Params) { p.Server = "root@esxi" }), fails: "--server: "},
		"a port too high":          {p: with(remote, func(p *vddk.Params) { p.Port = 65536 }), fails: "--port: 65536"},
		"a host port too high":     {p: with(remote, func(p *vddk.Params) { p.NFCHostPort = 1 << 31 }), fails: "--nfchostport: 2147483648"},
		"a compression":            {p: with(remote, func(p *vddk.Params) { p.Compression = "lz4" }), fails: `--compression: "lz4": expected one of none, zlib, fastlz, skipz`},
		"a thumbprint":             {p: with(remote, func(p *vddk.Params) { p.Thumbprint = "ab:cd" }), fails: "--thumbprint: "},
		"a zero byte in the path":  {p: with(remote, func(p *vddk.Params) { p.File = "[ds] a\x00b" }), fails: "zero byte"},
		"a zero byte in the login": {p: with(remote, func(p *vddk.Params) { p.Password = vddk.NewSecret("hunter2\x00") }), fails: "--password contains a zero byte"},
		"buffers of odd size":      {p: with(local, func(p *vddk.Params) { p.NFCBuffers = vddk.NFCBuffers{Size: 100 << 10, Count: 1} }), fails: "--nfc-buffers"},
		"no buffers":               {p: with(local, func(p *vddk.Params) { p.NFCBuffers = vddk.NFCBuffers{Size: 1 << 20} }), fails: "--nfc-buffers"},
		"buffers beyond any host":  {p: with(local, func(p *vddk.Params) { p.NFCBuffers = vddk.NFCBuffers{Size: 96 << 20, Count: 2} }), fails: "--nfc-buffers"},
	} {
		t.Run(name, func(t *testing.T) {
			err := c.p.Validate()
			if c.fails == "" {
				if err != nil {
					t.Fatal(err)
				}
				return
			}
			var wrong *vddk.ParamsError
			if !errors.As(err, &wrong) || !strings.Contains(err.Error(), c.fails) {
				t.Fatalf("%v, want a ParamsError with %q", err, c.fails)
			}
			if strings.Contains(err.Error()+wrong.Hint(), "hunter2") {
				t.Errorf("%v, %q: tells the password", err, wrong.Hint())
			}
		})
	}
}

func TestUnknownTransports(t *testing.T) {
	if got := vddk.UnknownTransports("file:san:hotadd:nbdssl:nbd"); len(got) > 0 {
		t.Errorf("%q", got)
	}
	if got := vddk.UnknownTransports("nbdssl:sna::NBD"); !slices.Equal(got, []string{"sna", "NBD"}) {
		t.Errorf("%q", got)
	}
}

// No way of printing parameters shows a secret.
func TestSecretsDoNotShow(t *testing.T) {
	s := vddk.NewSecret("hunter2")
	text, _ := s.MarshalText()
	for _, printed := range []string{fmt.Sprint(s), fmt.Sprintf("%v %+v %#v %s %q %x", s, s, s, s, s, s), fmt.Sprintf("%+v", vddk.Params{Password: s}), fmt.Sprintf("%#v", &vddk.Params{Cookie: s}), s.LogValue().String(), string(text)} {
		if strings.Contains(printed, "hunter2") || strings.Contains(printed, fmt.Sprintf("%x", "hunter2")) {
			t.Errorf("%s", printed)
		}
	}
}
