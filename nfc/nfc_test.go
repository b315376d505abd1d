package nfc_test

import (
	"context"
	"crypto/tls"
	"fmt"
	"testing"

	"github.com/vddkcp/vddkcp/nfc"
	"github.com/vddkcp/vddkcp/nfc/nfctest"
	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/source/sourcetest"
)

// TestHosts reads a disk from each kind of host, in each form and with each compression.
func TestHosts(t *testing.T) {
	content := pattern(1<<20+512, 1)
	for _, profile := range []nfctest.Profile{nfctest.ESXi8, nfctest.ESXi703, nfctest.ESXi70NoSHA256, nfctest.ESXi67} {
		for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
			for _, clear := range []bool{false, true} {
				for _, compression := range nfc.Compressions {
					name := fmt.Sprintf("%v/%s/clear=%v/%s", profile, tls.VersionName(version), clear, compression)
					t.Run(name, func(t *testing.T) {
						h, ts := newHost(t, content, nfctest.Options{Profile: profile, MaxTLS: version, PEM: clear})
						noLeaks(t, h)
						d := open(t, ts, nfc.Params{Name: file, Frozen: true, Capacity: int64(len(content))}, nfc.Options{Clear: clear, Compression: compression})
						readAll(t, d, content, 300<<10+1)
						if err := d.Close(); err != nil {
							t.Fatal(err)
						}
						if s := h.Stats(); s.Connections != 1 || s.CloseHandshakes != 1 || s.UnusedTickets != 0 {
							t.Errorf("%+v", s)
						}
					})
				}
			}
		}
	}
}

// TestConformance runs the suite that every disk must pass.
func TestConformance(t *testing.T) {
	for _, o := range []nfctest.Options{{}, {Shuffle: true, Seed: 7, Fragment: 3 * 512}} {
		content := pattern(512<<10+7*512, 2)
		_, ts := newHost(t, content, o)
		sourcetest.Run(t, sourcetest.Config{
			Open: func(ctx context.Context, t testing.TB) source.Disk {
				d, err := nfc.Open(ctx, nfc.Params{Name: file}, ts, nfc.Options{})
				if err != nil {
					t.Fatal(err)
				}
				return d
			},
			Content: content,
		})
	}
}
