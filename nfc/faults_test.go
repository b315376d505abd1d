package nfc_test

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vddkcp/vddkcp/internal/syncbuffer"
	"github.com/vddkcp/vddkcp/nfc"
	"github.com/vddkcp/vddkcp/nfc/nfctest"
	"github.com/vddkcp/vddkcp/nfc/wire"
	"github.com/vddkcp/vddkcp/source"
)

// The outcomes of a fault.
const (
	fails    = "fails"    // the opening fails, and another attempt may succeed
	varies   = "varies"   // another form of the handshake works
	harmless = "harmless" // the client does not mind
	ends     = "ends"     // the disk cannot be opened, and there is no other attempt
)

// stepsOfFault has the steps of the client that can fail because of a fault at a step of the host, if
// they differ from the step of the same name.
var stepsOfFault = map[nfctest.Step][]nfc.Step{
	nfctest.StepConnect: {nfc.StepConnect, nfc.StepBanner},
	nfctest.StepBanner:  {nfc.StepConnect, nfc.StepBanner}, // a reset can come before the connection is made
	// The host ends the connection after the answer that the client was waiting for.
	nfctest.StepDDB: {nfc.StepDDB, nfc.StepRead},
}

// fault returns a fault, and its outcome at the first opening of a disk and at a later one.
func fault(step nfctest.Step, kind nfctest.Kind) (f nfctest.Fault, first, later string) {
	f = nfctest.Fault{Step: step, Kind: kind, Fragment: 1}
	if kind == nfctest.Line {
		f.Text = "530 no"
	}
	first, later = fails, fails
	switch {
	case step == nfctest.StepThumbprint && kind != nfctest.WrongThumbprint:
		first = varies
	case step == nfctest.StepClose, kind == nfctest.CloseNotify:
		return f, harmless, harmless
	case kind == nfctest.WrongThumbprint, kind == nfctest.OtherCertificate:
		return f, ends, ends
	case kind == nfctest.Number && step == nfctest.StepHandshake36:
		return f, ends, ends // the host knows no frames
	case kind == nfctest.Number:
		f.Code = 12
		return f, harmless, harmless // a newer version
	case step == nfctest.StepOpenFile && (kind == nfctest.ErrorAlone || kind == nfctest.ErrorThenZeros ||
		kind == nfctest.ErrorThenData || kind == nfctest.ErrorTwice || kind == nfctest.Status):
		return f, ends, fails // error 11: a migration ends
	case step == nfctest.StepDDB && (kind == nfctest.ErrorAlone || kind == nfctest.ErrorThenZeros):
		return f, harmless, harmless // the entry is not known
	}
	return f, first, later
}

// silent reports whether a fault makes the client wait until its patience ends.
func silent(kind nfctest.Kind) bool {
	switch kind {
	case nfctest.Silence, nfctest.Stall, nfctest.Missing, nfctest.WrongPacked:
		return true
	}
	return false
}

// faultOptions are options for a fault, and the log and trace that they write.
func faultOptions(kind nfctest.Kind, compression string) (o nfc.Options, written *syncbuffer.Buffer) {
	written = new(syncbuffer.Buffer)
	o = nfc.Options{
		Timeout: 10 * time.Second, Compression: compression, Trace: nfc.NewTrace(written), Warn: func(text string) { fmt.Fprintln(written, text) },
		Log:   slog.New(slog.NewTextHandler(written, &slog.HandlerOptions{Level: slog.LevelDebug})),
		Retry: source.RetryOptions{Retries: 8, Backoff: func(int) time.Duration { return time.Millisecond }},
	}
	if silent(kind) {
		o.Timeout, o.Retry.Retries = patience*100*time.Millisecond, 20
	}
	return o, written
}

// eachLimit calls attempt with options for a fault. If the fault makes the client wait, their time
// limit is short, so that the test is quick. A loaded machine can exceed it before the fault
// happens. The function attempt then returns true, and is called again with a longer limit. With
// the longest limit, the parameter mayBeSlow is false, and attempt must report what it finds.
func eachLimit(kind nfctest.Kind, compression string, attempt func(o nfc.Options, written *syncbuffer.Buffer, mayBeSlow bool) (slow bool)) {
	for factor := time.Duration(1); ; factor *= 4 {
		o, written := faultOptions(kind, compression)
		last := !silent(kind) || factor == 64
		if silent(kind) {
			o.Timeout *= factor
		}
		if !attempt(o, written, !last) || last {
			return
		}
	}
}

// late reports whether an opening has exceeded a time limit at another step than that of a fault.
func late(err error, step nfctest.Step) bool {
	var e *nfc.Error
	return errors.Is(err, os.ErrDeadlineExceeded) && !(errors.As(err, &e) && slices.Contains(stepsOf(step), e.Step))
}

// stepsOf returns the steps of the client that can fail because of a fault at a step of the host.
func stepsOf(step nfctest.Step) []nfc.Step {
	if possible := stepsOfFault[step]; possible != nil {
		return possible
	}
	return []nfc.Step{nfc.Step(step)}
}

// checkError checks the error of an opening that a fault has made fail.
func checkError(t *testing.T, err error, step nfctest.Step, permanent bool) {
	t.Helper()
	var e *nfc.Error
	if !errors.As(err, &e) {
		t.Fatalf("%T %v: not an *nfc.Error", err, err)
	}
	possible := stepsOf(step)
	named := false
	for _, s := range possible {
		named = named || e.Step == s && strings.Contains(err.Error(), "nfc: "+string(s)+": ")
	}
	if !named {
		t.Errorf("the step %q, want one of %q: %v", e.Step, possible, err)
	}
	if source.IsPermanent(err) != permanent {
		t.Errorf("permanent %v: %v", !permanent, err)
	}
	if errors.As(err, new(*wire.ProtocolError)) && !(strings.Contains(err.Error(), "expected ") && strings.Contains(err.Error(), ", found ")) {
		t.Errorf("it does not say what was expected and found: %v", err)
	}
	if !strings.Contains(err.Error(), "host 127.0.0.1:") || len(err.Error()) > 2000 {
		t.Errorf("a text of %d bytes: %v", len(err.Error()), err)
	}
	if strings.Count(err.Error(), "connection lost") > 1 {
		t.Errorf("the text repeats itself: %v", err)
	}
}

// eachFault runs a test for each kind of fault at each step.
func eachFault(t *testing.T, test func(t *testing.T, f nfctest.Fault, first, later, compression string)) {
	for _, step := range nfctest.Steps() {
		for _, kind := range nfctest.Kinds(step) {
			compressions := nfc.Compressions[:1]
			if step == nfctest.StepRead {
				compressions = nfc.Compressions
			}
			for _, compression := range compressions {
				t.Run(fmt.Sprintf("%s/%v/%s", step, kind, compression), func(t *testing.T) {
					t.Parallel()
					f, first, later := fault(step, kind)
					test(t, f, first, later, compression)
				})
			}
		}
	}
}

// TestFaults makes the first opening of a disk meet each fault at each step.
func TestFaults(t *testing.T) {
	content := pattern(300<<10+512, 4)
	eachFault(t, func(t *testing.T, f nfctest.Fault, outcome, _, compression string) {
		eachLimit(f.Kind, compression, func(o nfc.Options, written *syncbuffer.Buffer, mayBeSlow bool) (slow bool) {
			h, ts := newHost(t, content, faultHost(f))
			t.Cleanup(func() {
				if !slow {
					left(t, h, f.Step)
				}
			})
			rule := h.On(f)
			begun := time.Now()
			d, err := nfc.Open(t.Context(), nfc.Params{Name: file, Frozen: true}, ts, o)
			if mayBeSlow && (late(err, f.Step) || ticketsLeft(h, f.Step)) {
				return true
			}
			if took := time.Since(begun); took > max(9*time.Second, 6*o.Timeout) {
				t.Errorf("it took %v", took)
			}
			checkFirst(t, d, err, f, outcome, content, written)
			if rule.Hits() == 0 {
				t.Error("the fault did not happen")
			}
			if leak := ts.leaks(fmt.Sprint(written, err)); leak != "" {
				t.Errorf("a secret is in an error, the trace or the log: %s", leak)
			}
			rule.Remove()
			readAll(t, open(t, ts, nfc.Params{Name: file}, nfc.Options{}), content, 1<<20)
			return false
		})
	})
}

// checkFirst checks the result of an opening that has met a fault, and closes the disk.
func checkFirst(t *testing.T, d source.Disk, err error, f nfctest.Fault, outcome string, content []byte, written *syncbuffer.Buffer) {
	t.Helper()
	switch {
	case outcome == varies && err == nil:
		if text := written.String(); !strings.Contains(text, "works only with sha2=off") || !strings.Contains(text, "with a SHA-1 thumbprint only") {
			t.Errorf("no warnings: %s", text)
		}
		d.Close()
	case outcome == harmless && err != nil:
		t.Fatal(err)
	case outcome == harmless:
		readAll(t, d, content, 100_001)
		d.Close()
	case err == nil:
		d.Close()
		t.Fatal("the disk was opened")
	default:
		checkError(t, err, f.Step, outcome == ends)
	}
}

// faultHost returns the options of a host for a fault.
func faultHost(f nfctest.Fault) nfctest.Options {
	return nfctest.Options{
		Fragment: 16 << 10, Shuffle: f.Kind%2 == 0,
		// The host has opened the file that its ERROR says it has not.
		AllowViolations: f.Step == nfctest.StepOpenFile && f.Kind == nfctest.ErrorThenData,
	}
}

// left checks that a client has ended its connections and used its tickets, after a fault at a step. A
// ticket can be used when the first TLS session is open.
func left(t *testing.T, h *nfctest.Host, step nfctest.Step) {
	t.Helper()
	if !h.AwaitClosed(10 * time.Second) {
		t.Errorf("%d connections are left", h.Stats().Open)
	}
	if ticketsLeft(h, step) {
		t.Errorf("%d tickets are left", h.Stats().UnusedTickets)
	}
}

// ticketsLeft reports whether a host has given tickets that were not used, although the connections
// came as far as the given step.
func ticketsLeft(h *nfctest.Host, step nfctest.Step) bool {
	early := step == nfctest.StepConnect || step == nfctest.StepBanner || step == nfctest.StepTLS
	s := h.Stats()
	return s.UnusedTickets > 0 && !early || s.UnusedTickets > s.Connections
}

// TestFaultsAgain loses the connection while a disk is read. The second connection then meets each
// fault at each step.
func TestFaultsAgain(t *testing.T) {
	content := pattern(300<<10+512, 5)
	eachFault(t, func(t *testing.T, f nfctest.Fault, _, outcome, compression string) {
		eachLimit(f.Kind, compression, func(o nfc.Options, written *syncbuffer.Buffer, mayBeSlow bool) (slow bool) {
			h, ts := newHost(t, content, faultHost(f))
			t.Cleanup(func() {
				if !slow {
					left(t, h, f.Step)
				}
			})
			d, err := nfc.Open(t.Context(), nfc.Params{Name: file, Frozen: f.Kind%4 < 2}, ts, o)
			if mayBeSlow && errors.Is(err, os.ErrDeadlineExceeded) {
				return true
			}
			if err != nil {
				t.Fatal(err)
			}
			defer d.Close()
			got := make([]byte, len(content))
			half := len(got)/2 + 77
			if _, err := d.ReadAt(got[:half], 0); err != nil {
				t.Fatal(err)
			}
			f := f
			f.Connection = h.Stats().Connections + 1
			rule := h.On(f)
			h.Cut()
			_, err = d.ReadAt(got[half:], int64(half))
			d.Close()
			if mayBeSlow && (rule.Hits() == 0 || ticketsLeft(h, f.Step)) {
				return true
			}
			checkAgain(t, err, f, outcome, bytes.Equal(got, content))
			if rule.Hits() == 0 {
				t.Error("the fault did not happen")
			}
			if leak := ts.leaks(fmt.Sprint(written, err)); leak != "" {
				t.Errorf("a secret is in an error, the trace or the log: %s", leak)
			}
			if s := h.Stats(); outcome == fails && s.Connections <= f.Connection && f.Step != nfctest.StepRead {
				t.Errorf("%+v", s)
			}
			return false
		})
	})
}

// checkAgain checks the result of a read after which the second connection has met a fault.
func checkAgain(t *testing.T, err error, f nfctest.Fault, outcome string, equal bool) {
	t.Helper()
	switch {
	case outcome == ends:
		checkError(t, err, f.Step, true)
		if !errors.Is(err, source.ErrReopen) {
			t.Errorf("not an error of opening again: %v", err)
		}
	case err != nil:
		t.Fatal(err)
	case !equal:
		t.Error("other bytes")
	}
}

// TestFaultsInReads makes reads of an open disk meet each fault.
func TestFaultsInReads(t *testing.T) {
	content := pattern(1<<20+512, 6)
	for _, kind := range nfctest.Kinds(nfctest.StepRead) {
		for i, compression := range nfc.Compressions {
			t.Run(fmt.Sprintf("%v/%s", kind, compression), func(t *testing.T) {
				t.Parallel()
				eachLimit(kind, compression, func(o nfc.Options, written *syncbuffer.Buffer, mayBeSlow bool) (slow bool) {
					h, ts := newHost(t, content, nfctest.Options{Fragment: 50 << 10 &^ 511, Shuffle: i%2 == 0})
					t.Cleanup(func() {
						if !slow {
							left(t, h, nfctest.StepRead)
						}
					})
					o.RequestSize = 150 << 10
					o.Timeout *= 2
					d, err := nfc.Open(t.Context(), nfc.Params{Name: file, Frozen: true}, ts, o)
					if mayBeSlow && errors.Is(err, os.ErrDeadlineExceeded) {
						return true
					}
					if err != nil {
						t.Fatal(err)
					}
					defer d.Close()
					rule := h.On(nfctest.Fault{Step: nfctest.StepRead, Kind: kind, Skip: 5, Times: 1, Fragment: 2})
					readAll(t, d, content, 1<<20)
					d.Close()
					if mayBeSlow && ticketsLeft(h, nfctest.StepRead) {
						return true
					}
					if rule.Hits() != 1 {
						t.Errorf("the fault happened %d times", rule.Hits())
					}
					if leak := ts.leaks(written.String()); leak != "" {
						t.Errorf("a secret is in an error, the trace or the log: %s", leak)
					}
					return false
				})
			})
		}
	}
}
