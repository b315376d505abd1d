package nfc_test

import (
	"errors"
	"slices"
	"testing"

	"github.com/vddkcp/vddkcp/nfc"
	"github.com/vddkcp/vddkcp/nfc/nfctest"
)

// TestProbe connects to a host without opening a file.
func TestProbe(t *testing.T) {
	h, ts := newHost(t, pattern(1<<20, 3), nfctest.Options{})
	noLeaks(t, h)
	var steps []nfc.Step
	o := nfc.Options{Step: func(s nfc.Step) { steps = append(steps, s) }}
	p, err := nfc.Probe(t.Context(), ts, o)
	if err != nil {
		t.Fatal(err)
	}
	want := []nfc.Step{nfc.StepTicket, nfc.StepConnect, nfc.StepBanner, nfc.StepTLS, nfc.StepSession, nfc.StepThumbprint, nfc.StepProxy,
		nfc.StepSecondTLS, nfc.StepHello, nfc.StepVersion, nfc.StepFrames, nfc.StepOpenSession, nfc.StepSockOpts, nfc.StepResourcePool, nfc.StepClose}
	if !slices.Equal(steps, want) || p.Version != "11.0" || p.Variant != "" {
		t.Errorf("%+v after %q", p, steps)
	}

	_, ts = newHost(t, nil, nfctest.Options{NoSSL: true})
	steps = nil
	p, err = nfc.Probe(t.Context(), ts, o)
	var failed *nfc.Error
	if !errors.As(err, &failed) || failed.Step != nfc.StepBanner || !slices.Equal(steps, want[:3]) {
		t.Errorf("%+v after %q: %v", p, steps, err)
	}
}
