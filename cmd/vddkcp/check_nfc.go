package main

import (
	"context"
	"errors"
	"slices"
	"strings"

	"github.com/vddkcp/vddkcp/internal/printable"
	"github.com/vddkcp/vddkcp/nfc"
)

// checkNFC connects to the host of the VM, as a copy with --via nfc does, and opens a session there. It
// opens no disk, so that it needs no snapshot.
func (c *serverChecks) checkNFC(ctx context.Context) []checkResult {
	p, err := c.probe(ctx, c.handle)
	if err != nil {
		r := checkError(ctx, err)
		r[0].Detail += "; " + c.progress.reached(err)
		return r
	}
	session := "opens a session"
	if c.clear {
		session += " without encryption"
	}
	detail := "the host " + printable.Name(p.Host) + " accepts a ticket and " + session + " (NFC version " + p.Version + "); " + c.progress.reached(nil)
	if p.Variant != "" {
		return checkWarning("please report this, as docs/guide/nfc.md describes", "%s; the handshake works only with %s", detail, p.Variant)
	}
	return checkOK("%s", detail)
}

// nfcProgress records how far a connection over NFC has come.
type nfcProgress struct{ steps []nfc.Step }

// The method begin records that a step begins. It is an nfc.Options.Step.
func (p *nfcProgress) begin(s nfc.Step) {
	switch s {
	case nfc.StepTicket:
		p.steps = p.steps[:0]
	case nfc.StepClose: // comes after a failed step, too
		return
	}
	p.steps = append(p.steps, s)
}

// The method reached says how far the last connection has come. The error is that of the connection.
func (p *nfcProgress) reached(err error) string {
	steps := p.steps
	var failed *nfc.Error
	if errors.As(err, &failed) {
		if i := slices.Index(steps, failed.Step); i >= 0 {
			steps = steps[:i]
		}
	}
	if len(steps) == 0 {
		return "no step succeeded"
	}
	names := make([]string, len(steps))
	for i, s := range steps {
		names[i] = string(s)
	}
	return "these steps succeeded: " + strings.Join(names, ", ")
}
