package nfc

import (
	"context"
	"fmt"
	"os"
)

// Probed is the result of Probe.
type Probed struct {
	Steps   []Step // that succeeded, in their order
	Host    string // address of the host; "" if no ticket was given
	Banner  string // first line of the host; "" if the connection has not come that far
	Version string // of the host's NFC service, such as "11.0"; "" if the connection has not come that far
	Variant string // how the handshake that works differs from the usual one; "" if it does not
}

// Probe connects to a host and opens a session there, but no file. It performs the steps from
// StepTicket to StepResourcePool and ends the session. The result says how far the connection has come,
// even if there is an error. Probe repeats nothing. Options.Step is called as well.
func Probe(ctx context.Context, t Tickets, o Options) (*Probed, error) {
	p := new(Probed)
	step := o.Step
	var begun Step // the step that has begun and not succeeded yet
	o.Step = func(s Step) {
		if s == StepTicket {
			p.Steps = nil // another form of the handshake is tried
		} else {
			p.Steps = append(p.Steps, begun)
		}
		begun = s
		if step != nil {
			step(s)
		}
	}
	o, err := o.normalised()
	if err != nil {
		return p, err
	}
	op := newOpener(Params{}, t, o)
	limit := openTimeouts * o.Timeout
	ctx, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("the host did not answer within %v: %w", limit, os.ErrDeadlineExceeded))
	defer cancel()
	if err := op.acquire(ctx); err != nil {
		return p, err
	}
	defer op.release()
	d, variant, err := op.connect(ctx)
	if err != nil {
		return p, err
	}
	p.Host, p.Banner, p.Variant = d.address, d.hide(d.banner.Text), variant
	p.Version = d.version()
	c := newConn(d, op.limits, o.Timeout)
	s := &session{opener: op, dialogue: d, conn: c}
	stop := c.watch(ctx)
	err = s.begin()
	stop()
	if err == nil {
		p.Steps = append(p.Steps, begun)
	}
	op.o.Step = nil
	s.end(ctx)
	return p, err
}
