package nfc

import "io"

// Trace records what is sent and received on connections to hosts. Data of disks is recorded as its
// length and checksum. No secrets are recorded. Its methods are safe for concurrent use.
type Trace struct{ w io.Writer }

// NewTrace returns a Trace that writes to w. After an error of w, it writes nothing more.
func NewTrace(w io.Writer) *Trace { return &Trace{w: w} }

// Err returns the first error of writing the trace.
func (t *Trace) Err() error { return nil }
