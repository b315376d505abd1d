package nfc_test

import (
	"bytes"
	"encoding/hex"
	"errors"
	"regexp"
	"strings"
	"testing"

	"github.com/vddkcp/vddkcp/internal/syncbuffer"
	"github.com/vddkcp/vddkcp/nfc"
	"github.com/vddkcp/vddkcp/nfc/nfctest"
	"github.com/vddkcp/vddkcp/source"
)

// TestTrace records a whole connection. The trace has every step, and no secret.
func TestTrace(t *testing.T) {
	content := pattern(1<<20, 100)
	for _, c := range []struct {
		name  string
		clear bool
		fault nfctest.Fault
	}{
		{name: "nfcssl"},
		{name: "nfc", clear: true},
		{name: "a refused file", fault: nfctest.Fault{Step: nfctest.StepOpenFile, Kind: nfctest.ErrorThenZeros}},
		{name: "an error of the handshake", fault: nfctest.Fault{Step: nfctest.StepHandshake52, Kind: nfctest.NFCError}},
	} {
		t.Run(c.name, func(t *testing.T) {
			log, written := new(syncbuffer.Buffer), new(syncbuffer.Buffer)
			h, ts := newHost(t, content, nfctest.Options{Log: log})
			noLeaks(t, h)
			if c.fault.Step != "" {
				h.On(c.fault)
			}
			d, err := nfc.Open(t.Context(), nfc.Params{Name: file}, ts, nfc.Options{Trace: nfc.NewTrace(written), Clear: c.clear})
			if err == nil {
				readAll(t, d, content, 1<<20)
				d.Close()
				for _, s := range []nfc.Step{
					nfc.StepConnect, nfc.StepBanner, nfc.StepTLS, nfc.StepSession, nfc.StepThumbprint, nfc.StepProxy, nfc.StepSecondTLS, nfc.StepHello,
					nfc.StepVersion, nfc.StepFrames, nfc.StepOpenSession, nfc.StepSockOpts, nfc.StepResourcePool, nfc.StepOpenFile, nfc.StepDDB,
					nfc.StepRead, nfc.StepClose,
				} {
					if !strings.Contains(written.String(), "["+string(s)+"] ") && !(c.clear && s == nfc.StepSecondTLS) {
						t.Errorf("the step %q is not in the trace", s)
					}
				}
			} else if c.fault.Step == "" {
				t.Fatal(err)
			}
			trace := written.String()
			for i, line := range strings.Split(strings.TrimSuffix(trace, "\n"), "\n") {
				if !traceLine.MatchString(line) {
					t.Errorf("line %d: %s", i+1, line)
				}
			}
			if leak := ts.leaks(trace); leak != "" {
				t.Errorf("a secret: %s", leak)
			}
			tokens := regexp.MustCompile(`> THUMBPRINT_SHA2 (\S+)`).FindAllStringSubmatch(log.String(), -1)
			if len(tokens) == 0 {
				t.Fatal("the host has got no token")
			}
			for _, m := range tokens {
				if strings.Contains(trace, m[1]) || strings.Contains(trace, hex.EncodeToString([]byte(m[1]))) {
					t.Errorf("the token %q is in the trace", m[1])
				}
			}
			if !strings.Contains(trace, "> [session] line SESSION ***\n") || !strings.Contains(trace, "line THUMBPRINT_SHA2 ***\n") {
				t.Error("lines are missing")
			}
		})
	}
}

var traceLine = regexp.MustCompile(`^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z [1-9]\d* [-<>] \[[a-z0-9 ]+\] \S.*$`)

// TestEchoedSecret has a host that repeats the secret of the ticket in its texts.
func TestEchoedSecret(t *testing.T) {
	for _, f := range []nfctest.Fault{
		{Step: nfctest.StepBanner, Kind: nfctest.Line}, {Step: nfctest.StepSession, Kind: nfctest.Line}, {Step: nfctest.StepThumbprint, Kind: nfctest.Line},
		{Step: nfctest.StepProxy, Kind: nfctest.Line}, {Step: nfctest.StepHandshake36, Kind: nfctest.NFCError},
		{Step: nfctest.StepHandshake52, Kind: nfctest.NFCError}, {Step: nfctest.StepOpenFile, Kind: nfctest.ErrorThenZeros},
		{Step: nfctest.StepRead, Kind: nfctest.ErrorThenZeros}, {Step: nfctest.StepOpenSession, Kind: nfctest.ErrorAlone},
	} {
		t.Run(string(f.Step), func(t *testing.T) {
			h, ts := newHost(t, pattern(1<<20, 101), nfctest.Options{})
			var rule *nfctest.Rule
			ts.before = func(_ int, ticket *nfc.Ticket) error {
				if rule != nil {
					rule.Remove()
				}
				f := f
				f.Text = "500 no " + ticket.Session.Reveal() + " today"
				rule = h.On(f)
				return nil
			}
			o, written := faultOptions(f.Kind, "")
			_, err := nfc.Open(t.Context(), nfc.Params{Name: file}, ts, o)
			if f.Step != nfctest.StepThumbprint && err == nil {
				t.Fatal("the disk was opened")
			}
			if err == nil {
				err = errors.New("none")
			}
			for _, text := range []string{err.Error(), written.String()} {
				if leak := ts.leaks(text); leak != "" {
					t.Errorf("a secret: %s", leak)
				}
			}
		})
	}
}

// TestEchoedSecretOfDisk has a host whose disk has the secret of the ticket in its descriptor.
func TestEchoedSecretOfDisk(t *testing.T) {
	h, ts := newHost(t, nil, nfctest.Options{})
	ts.before = func(_ int, ticket *nfc.Ticket) error {
		h.AddDisk(file, nfctest.Disk{Content: bytes.NewReader(nil), Size: 512, DDB: map[string]string{"uuid": "no " + ticket.Session.Reveal()}})
		return nil
	}
	o, written := faultOptions(nfctest.Nothing, "")
	d := open(t, ts, nfc.Params{Name: file}, o)
	i, _ := source.Ability[source.Described](d)
	if leak := ts.leaks(written.String() + i.Info().UUID); leak != "" || i.Info().UUID != "no ***" {
		t.Errorf("a secret: %s", leak)
	}
}

// failing is a writer that fails after some bytes.
type failing struct{ left int }

var errFull = errors.New("no space left on device")

func (f *failing) Write(p []byte) (int, error) {
	if f.left -= len(p); f.left < 0 {
		return 0, errFull
	}
	return len(p), nil
}

// TestTraceError fails to write a trace. The disk is read all the same.
func TestTraceError(t *testing.T) {
	content := pattern(1<<20, 102)
	_, ts := newHost(t, content, nfctest.Options{})
	trace := nfc.NewTrace(&failing{left: 1000})
	d := open(t, ts, nfc.Params{Name: file}, nfc.Options{Trace: trace})
	readAll(t, d, content, 1<<20)
	if err := trace.Err(); err != errFull {
		t.Error(err)
	}
}
