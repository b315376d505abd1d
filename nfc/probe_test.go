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
	p, err := nfc.Probe(t.Context(), ts, nfc.Options{})
	if err != nil {
		t.Fatal(err)
	}
	want := []nfc.Step{nfc.StepTicket, nfc.StepConnect, nfc.StepBanner, nfc.StepTLS, nfc.StepSession, nfc.StepThumbprint, nfc.StepProxy,
		nfc.StepSecondTLS, nfc.StepHello, nfc.StepVersion, nfc.StepFrames, nfc.StepOpenSession, nfc.StepSockOpts, nfc.StepResourcePool}
	if !slices.Equal(p.Steps, want) || p.Version != "11.0" || p.Variant != "" {
		t.Errorf("%+v", p)
	}

	_, ts = newHost(t, nil, nfctest.Options{NoSSL: true})
	p, err = nfc.Probe(t.Context(), ts, nfc.Options{})
	var failed *nfc.Error
	if !errors.As(err, &failed) || failed.Step != nfc.StepBanner || !slices.Equal(p.Steps, want[:2]) {
		t.Errorf("%+v: %v", p, err)
	}
}
