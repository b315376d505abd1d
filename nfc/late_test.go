package nfc_test

import (
	"testing"
	"time"

	"github.com/vddkcp/vddkcp/nfc"
	"github.com/vddkcp/vddkcp/nfc/nfctest"
)

// TestLateAnswers opens a disk on a host that answers one step late. Only the steps that another
// form of the handshake may change have a short time limit, and the last form has none.
func TestLateAnswers(t *testing.T) {
	const timeout = 100 * time.Millisecond
	for _, c := range []struct {
		step    nfctest.Step
		tickets int
	}{
		{nfctest.StepBanner, 1},
		{nfctest.StepSession, 1},
		{nfctest.StepProxy, 1},
		{nfctest.StepSecondTLS, 1},
		{nfctest.StepHandshake36, 2},
	} {
		t.Run(string(c.step), func(t *testing.T) {
			content := pattern(1<<20, 1)
			h, ts := newHost(t, content, nfctest.Options{})
			rule := h.On(nfctest.Fault{Step: c.step, Kind: nfctest.Silence, Connection: 1})
			go func() {
				<-rule.Arrived()
				time.AfterFunc(3*timeout, rule.Release)
			}()
			o := quick()
			o.Timeout = timeout
			d, err := nfc.Open(t.Context(), nfc.Params{}, ts, o)
			if err != nil {
				t.Fatal(err)
			}
			if err := d.Close(); err != nil {
				t.Error(err)
			}
			if ts.count() != c.tickets {
				t.Errorf("%d tickets, want %d", ts.count(), c.tickets)
			}
		})
	}
}
