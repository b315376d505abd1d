package nfc

import "context"

// Probed is the result of Probe. After an error, the fields that are not known are empty.
type Probed struct {
	Host    string // address of the host
	Version string // of the host's NFC service, such as "11.0"
	Variant string // how the handshake that works differs from the usual one; "" if it does not
}

// Probe connects to a host and opens a session there, but no file. It performs the steps from
// StepTicket to StepResourcePool and ends the session. Options.Step says how far the connection has
// come. Probe repeats nothing. The result is never nil.
func Probe(ctx context.Context, t Tickets, o Options) (*Probed, error) {
	p := new(Probed)
	o, err := o.normalised()
	if err != nil {
		return p, err
	}
	op := newOpener(Params{}, t, o)
	ctx, cancel := o.limit(ctx)
	defer cancel()
	if err := op.acquire(ctx); err != nil {
		return p, err
	}
	defer op.release()
	d, variant, err := op.connect(ctx)
	if err != nil {
		return p, err
	}
	p.Host, p.Version, p.Variant = d.address, d.version(), variant
	c := newConn(d, op.limits, o.Timeout)
	s := &session{opener: op, dialogue: d, conn: c}
	stop := c.watch(ctx)
	err = s.begin()
	stop()
	s.end(ctx)
	return p, err
}
