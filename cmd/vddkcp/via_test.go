package main

import (
	"strings"
	"testing"

	"github.com/vddkcp/vddkcp/internal/exit"
	"github.com/vddkcp/vddkcp/internal/secret"
	"github.com/vddkcp/vddkcp/transfer/report"
)

// TestChooseWay checks how disks are read, by the command line of a copy and the environment.
func TestChooseWay(t *testing.T) {
	config := setConfig(t, `{"servers": {"n": {"server": "n", "user": "u", "via": "nfc"}, "v": {"server": "v", "via": "vddk"}}}`)
	const file, vm = "[ds] a/a.vmdk", "vm:web01#1"
	for name, c := range map[string]struct {
		src   string
		flags string
		env   string // VDDKCP_VIA
		want  string // way.String, or the error
	}{
		"default":                  {src: vm, want: "via vddk: the default"},
		"default of a file":        {src: file, want: "via vddk: the default"},
		"flag":                     {src: vm, flags: "--via nfc", want: "via nfc: asked for (--via)"},
		"flag for a file":          {src: file, flags: "--via nfc", want: "via nfc: asked for (--via)"},
		"flag vddk":                {src: vm, flags: "--via vddk", env: "nfc", want: "via vddk: asked for (--via)"},
		"flag auto":                {src: vm, flags: "--via auto", env: "nfc", want: "via vddk: chosen by auto (--via)"},
		"flag without a value":     {src: vm, flags: "--via=", env: "nfc", want: "via vddk: the default"},
		"variable":                 {src: vm, env: "nfc", want: "via nfc: asked for (VDDKCP_VIA)"},
		"variable before profile":  {src: vm, flags: "--profile n", env: "vddk", want: "via vddk: asked for (VDDKCP_VIA)"},
		"profile":                  {src: vm, flags: "--profile n", want: "via nfc: asked for (profile n in " + config + ")"},
		"profile vddk":             {src: vm, flags: "--profile v", want: "via vddk: asked for (profile v in " + config + ")"},
		"no such profile":          {src: vm, flags: "--profile x --via nfc --libdir l", want: ""}, // is an error later
		"a local disk":             {src: "a.raw", env: "nfc", want: ""},
		"a local disk of VDDK":     {src: "vddk:/a.vmdk", env: "nfc", want: ""},
		"a disk of VDDK":           {src: "vddk:/a.vmdk", flags: "--server h", env: "nfc", want: "via vddk: the address begins with vddk:"},
		"a local disk and a flag":  {src: "a.raw", flags: "--via nfc", want: "--via: nfc is for disks on a server, and a.raw is not on a server"},
		"a disk of VDDK and flag":  {src: "vddk:/a.vmdk", flags: "--server h --via nfc", want: "--via: nfc cannot read vddk:/a.vmdk, which names a disk that VDDK opens"},
		"transports":               {src: vm, flags: "--via nfc --transports nbdssl:nbd", want: "via nfc: asked for (--via)"},
		"other transports":         {src: vm, flags: "--via nfc --transports nbd:file", want: "--transports: with --via nfc, want nbdssl or nbd, found file"},
		"an unknown transport":     {src: vm, flags: "--via nfc --transports ssh", want: "--transports: with --via nfc, want nbdssl or nbd, found ssh"},
		"prepare-access":           {src: vm, flags: "--profile n --prepare-access", want: "--prepare-access: with nfc, which is asked for (profile n in " + config + "), flags for VDDK cannot be used"},
		"single-link":              {src: file, flags: "--via nfc --single-link --backing b", want: "--single-link: with --via nfc, a disk cannot be read without its parents"},
		"largest values":           {src: vm, flags: "--via nfc --depth 32 --request-size 1MiB --connections 1 --nfc-buffers 2MiBx8", want: "via nfc: asked for (--via)"},
		"too many reads":           {src: vm, flags: "--via nfc --depth 33", want: "--depth: with --via nfc, want 1 to 32 concurrent reads, found 33"},
		"too many connections":     {src: vm, flags: "--via nfc --connections 2", want: "--connections: with --via nfc, want 1 connection, found 2"},
		"too many buffers":         {src: vm, flags: "--via nfc --nfc-buffers 2MiBx9", want: "--nfc-buffers: with --via nfc, want one or more buffers whose size is a multiple of 64KiB, of at most 2MiB each and 16MiB together, found 2MiBx9"},
		"odd buffers":              {src: vm, flags: "--via nfc --nfc-buffers 65KiBx9", want: "--nfc-buffers: with --via nfc, want one or more buffers whose size is a multiple of 64KiB, of at most 2MiB each and 16MiB together, found 65KiBx9"},
		"large requests with VDDK": {src: vm, flags: "--depth 33 --request-size 2MiB", want: "via vddk: the default"},
		"debug flags of VDDK":      {src: vm, flags: "--via nfc -D vddk.datapath=0", want: "via nfc: asked for (--via)"},
		"trace":                    {src: vm, flags: "--via nfc --nfc-trace t", want: "via nfc: asked for (--via)"},
		"trace with VDDK":          {src: vm, flags: "--nfc-trace t", want: "--nfc-trace needs --via nfc"},
	} {
		t.Run(name, func(t *testing.T) {
			if c.env != "" {
				t.Setenv("VDDKCP_VIA", c.env)
			}
			command, err := parsed(&secretEnvironment{password: secret.New("p")}, append([]string{c.src, "out"}, strings.Fields(c.flags)...)...)
			if err != nil {
				t.Fatal(err)
			}
			err = command.chooseWay()
			got, depth := "", 4
			switch w := command.chosen; {
			case err != nil:
				if got = err.Error(); report.Of(err).Exit != exit.Usage || report.Of(err).Hint == "" {
					t.Errorf("%+v, want a usage error with a hint", report.Of(err))
				}
			case w.reason != "":
				got = w.String()
			}
			if got != c.want {
				t.Errorf("got  %s\nwant %s", got, c.want)
			}
			if strings.Contains(c.flags, "--depth") {
				return
			}
			if command.chosen.nfc {
				depth = 16
			}
			if s := command.spec(); s.Depth != depth || (s.Opener.Datastore != nil) != command.chosen.nfc {
				t.Errorf("%d concurrent reads, want %d; opens files: %t", s.Depth, depth, s.Opener.Datastore != nil)
			}
		})
	}
}

// TestClearTransport checks in which order transport modes ask for encryption.
func TestClearTransport(t *testing.T) {
	for list, want := range map[string]bool{"": false, "nbdssl": false, "nbd": true, "nbdssl:nbd": false, "nbd:nbdssl": true, ":nbd": true} {
		if got := (&vddkFlags{Transports: list}).clear(); got != want {
			t.Errorf("%q: without encryption: %t, want %t", list, got, want)
		}
	}
}
