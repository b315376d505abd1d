package nfc_test

import (
	"errors"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/vddkcp/vddkcp/internal/syncbuffer"
	"github.com/vddkcp/vddkcp/nfc"
	"github.com/vddkcp/vddkcp/nfc/nfctest"
	"github.com/vddkcp/vddkcp/source"
)

// TestVariants opens two disks on hosts that do not accept the usual form of the handshake.
func TestVariants(t *testing.T) {
	content := pattern(1<<20, 40)
	second, third := "token=plaintext,names=2,ack=wait", "sha2=off"
	for _, c := range []struct {
		name    string
		needs   nfctest.Needs
		quirks  string
		profile nfctest.Profile
		tickets int    // for the first disk
		variant string // that works; "-": none does
	}{
		{name: "usual", tickets: 1},
		{name: "token", needs: nfctest.Needs{PlainToken: true}, tickets: 2, variant: second},
		{name: "names", needs: nfctest.Needs{SplitNames: true}, tickets: 2, variant: second},
		{name: "wait", needs: nfctest.Needs{WaitForAck: true}, tickets: 2, variant: second},
		{name: "all", needs: nfctest.Needs{PlainToken: true, SplitNames: true, WaitForAck: true}, tickets: 2, variant: second},
		{name: "all, silent", needs: nfctest.Needs{PlainToken: true, SplitNames: true, WaitForAck: true, Silent: true}, tickets: 2, variant: second},
		{name: "SHA-2", needs: nfctest.Needs{NoSHA2: true}, tickets: 3, variant: third},
		{name: "nothing", needs: nfctest.Needs{NoSHA2: true, SplitNames: true}, tickets: 3, variant: "-"},
		{name: "given", needs: nfctest.Needs{PlainToken: true, SplitNames: true}, quirks: "token=plaintext,names=2", tickets: 1},
		{name: "given against the variants", needs: nfctest.Needs{PlainToken: true}, quirks: "token=random", tickets: 3, variant: third},
		{name: "ESXi 6.7", profile: nfctest.ESXi67, tickets: 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			h, ts := newHost(t, content, nfctest.Options{Needs: c.needs, Profile: c.profile})
			t.Cleanup(func() { left(t, h, nfctest.StepRead) })
			quirks, err := nfc.ParseQuirks(c.quirks)
			if err != nil {
				t.Fatal(err)
			}
			var warnings, weak []string
			o := nfc.Options{Quirks: quirks, Hosts: nfc.NewHosts(), Warn: func(text string) {
				if strings.Contains(text, "with a SHA-1 thumbprint only") {
					weak = append(weak, text)
				} else {
					warnings = append(warnings, text)
				}
			}}
			if c.needs.Silent {
				o.Timeout = patience * time.Second
			}
			d, err := nfc.Open(t.Context(), nfc.Params{Name: file}, ts, o)
			if ts.count() != c.tickets {
				t.Errorf("%d tickets for the first disk, want %d", ts.count(), c.tickets)
			}
			if c.variant == "-" {
				var e *nfc.Error
				if !errors.As(err, &e) || e.Step != nfc.StepThumbprint || source.IsPermanent(err) {
					t.Errorf("%v", err)
				}
				if p, err := nfc.Probe(t.Context(), ts, o); err == nil || p.Variant != "" {
					t.Errorf("%+v, %v", p, err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			readAll(t, d, content, 1<<20)
			d.Close()
			if c.variant == "" != (len(warnings) == 0) || len(warnings) > 1 || len(warnings) == 1 && !strings.Contains(warnings[0], c.variant) {
				t.Errorf("warnings %q", warnings)
			}
			d = open(t, ts, nfc.Params{Name: file}, o)
			readAll(t, d, content, 1<<20)
			d.Close()
			if ts.count() != c.tickets+1 || len(warnings) > 1 {
				t.Errorf("%d tickets for two disks, want %d; warnings %q", ts.count(), c.tickets+1, warnings)
			}
			sha1 := c.variant == third || c.profile == nfctest.ESXi67
			if len(weak) != 0 != sha1 || sha1 && len(weak) != 2 { // one for each disk
				t.Errorf("warnings about SHA-1: %q", weak)
			}
			p, err := nfc.Probe(t.Context(), ts, o)
			if err != nil || p.Variant != c.variant {
				t.Errorf("%+v, %v", p, err)
			}
		})
	}
}

// TestTooOld connects to a host of version 6.0.
func TestTooOld(t *testing.T) {
	h, ts := newHost(t, pattern(1<<20, 41), nfctest.Options{Profile: nfctest.ESXi60})
	noLeaks(t, h)
	_, err := nfc.Open(t.Context(), nfc.Params{Name: file}, ts, quick())
	var e *nfc.Error
	if !errors.As(err, &e) || e.Step != nfc.StepHello || !source.IsPermanent(err) || !strings.Contains(err.Error(), "too old") || ts.count() != 1 {
		t.Errorf("%d tickets: %v", ts.count(), err)
	}
}

// TestQuirksOnWire uses each quirk and looks for its effect.
func TestQuirksOnWire(t *testing.T) {
	content := pattern(3<<20, 42)
	for _, c := range []struct {
		quirks string
		trace  []string // expressions for texts that the trace has
		not    []string // and for texts that it has not
	}{
		{"token=none", nil, []string{"THUMBPRINT_SHA2", "CLIENT_RANDOM"}},
		{"token=random", []string{"token of 16 bytes"}, nil},
		{"token=plaintext", []string{"token of 9 bytes"}, nil},
		{"sha2=off", nil, []string{"THUMBPRINT_SHA2", "CLIENT_RANDOM"}},
		{"sha2=on", []string{"THUMBPRINT_SHA2", "CLIENT_RANDOM"}, nil},
		{"ack=wait", []string{`> \[handshake 51\] message VERSION`}, []string{`> \[handshake 36\] message VERSION`}},
		{"ack=early", []string{`> \[handshake 36\] message VERSION`}, []string{`> \[handshake 51\] message VERSION`}},
		{"version=12.1", []string{`message VERSION \(51\), major 12, minor 1 `}, nil},
		{"names=2", nil, nil},
		{"session=zeros", []string{"buffer bytes 0, buffer count 0"}, nil},
		{"session=sizes", []string{"buffer bytes 1048576, buffer count 4"}, nil},
		{"close=long", []string{`CLOSE_FILE \(5\), opId \d+, payload of 16 bytes`, `CLOSE_SESSION \(3\), opId \d+, payload of 16 bytes`}, nil},
		{"close=short", []string{`CLOSE_FILE \(5\), opId \d+, payload of 8 bytes`, `CLOSE_SESSION \(3\), opId \d+, payload of 4 bytes`}, nil},
		{"maxread=256KiB,maxdepth=2", []string{"length again 262144"}, []string{"length again 524288", "length again 1048576"}},
	} {
		t.Run(c.quirks, func(t *testing.T) {
			h, ts := newHost(t, content, nfctest.Options{Needs: nfctest.Needs{SplitNames: c.quirks == "names=2"}})
			noLeaks(t, h)
			quirks, err := nfc.ParseQuirks(c.quirks)
			if err != nil {
				t.Fatal(err)
			}
			written := new(syncbuffer.Buffer)
			d := open(t, ts, nfc.Params{Name: file}, nfc.Options{Quirks: quirks, Trace: nfc.NewTrace(written)})
			readAll(t, d, content, 3<<20)
			d.Close()
			trace := written.String()
			for _, text := range append(c.trace, "quirks "+c.quirks+"\n") {
				if !regexp.MustCompile(text).MatchString(trace) {
					t.Errorf("the trace does not have %q:\n%s", text, trace)
				}
			}
			for _, text := range c.not {
				if regexp.MustCompile(text).MatchString(trace) {
					t.Errorf("the trace has %q:\n%s", text, trace)
				}
			}
			s := h.Stats()
			if s.Connections != 1 || strings.Contains(c.quirks, "maxdepth=2") && s.InFlight > 2 {
				t.Errorf("%+v", s)
			}
		})
	}
}

// TestParseQuirks parses good and bad lists.
func TestParseQuirks(t *testing.T) {
	for _, good := range []string{
		"", "token=random", "token=plaintext", "token=none", "ack=early", "ack=wait", "version=11.0", "version=1.4294967", "names=1", "names=2",
		"session=sizes", "session=zeros", "close=short", "close=long", "sha2=on", "sha2=off", "maxread=1MiB", "maxread=512", "maxread=64KiB",
		"maxdepth=1", "maxdepth=32",
		"token=plaintext,ack=wait,version=12.1,names=2,session=zeros,close=long,sha2=off,maxread=128KiB,maxdepth=4",
	} {
		q, err := nfc.ParseQuirks(good)
		if err != nil || q.String() != good {
			t.Errorf("%q: %q, %v", good, q, err)
		}
	}
	for _, c := range []struct{ bad, text string }{
		{"token", `"token": want KEY=VALUE, where KEY is one of token, ack, version, names, session, close, sha2, maxread, maxdepth`},
		{"token=", `"token=": want one of random, plaintext, none`},
		{"=random", `"=random": want KEY=VALUE`},
		{"Token=random", `"Token=random": want KEY=VALUE`},
		{"flags=0x16", `"flags=0x16": want KEY=VALUE`},
		{"token=none,", `"": want KEY=VALUE`},
		{",token=none", `"": want KEY=VALUE`},
		{"token=none, ack=wait", `" ack=wait": want KEY=VALUE`},
		{"ack=wait,ack=wait", `the key ack is given twice`},
		{"ack=1", `"ack=1": want one of early, wait`},
		{"names=3", `"names=3": want one of 1, 2`},
		{"session=none", "want one of sizes, zeros"},
		{"close=no", "want one of short, long"},
		{"sha2=yes", "want one of on, off"},
		{"version=11", `"version=11": want a version such as 11.0`},
		{"version=11.", "want a version"},
		{"version=.1", "want a version"},
		{"version=0.1", "want a version"},
		{"version=-1.0", "want a version"},
		{"version=4294967296.0", "want a version"},
		{"version=11.0.1", "want a version"},
		{"maxread=0", "want a multiple of 512 bytes, at most 1MiB"},
		{"maxread=513", "want a multiple of 512"},
		{"maxread=2MiB", "want a multiple of 512"},
		{"maxread=x", "want a multiple of 512"},
		{"maxread=-512", "want a multiple of 512"},
		{"maxdepth=0", "want a number from 1 to 32"},
		{"maxdepth=33", "want a number from 1 to 32"},
		{"maxdepth=-1", "want a number"},
		{"maxdepth=x", "want a number"},
		{"maxdepth=4294967297", "want a number"},
	} {
		q, err := nfc.ParseQuirks(c.bad)
		if err == nil || !strings.Contains(err.Error(), c.text) || q.String() != "" {
			t.Errorf("%q: %q, %v", c.bad, q, err)
		}
	}
}
