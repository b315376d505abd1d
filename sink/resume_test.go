package sink_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/vddkcp/vddkcp/sink"
)

// TestCheckResume checks which offsets and states a resumed target accepts.
func TestCheckResume(t *testing.T) {
	const size = 1 << 20
	for _, c := range []struct {
		name  string
		size  int64
		o     sink.Options
		fails string // "": the options are valid
		unfit bool
	}{
		{"a new target", size, sink.Options{}, "", false},
		{"at the start", size, sink.Options{State: []byte("raw")}, "", false},
		{"at the end", size, sink.Options{State: []byte("raw"), Resume: size}, "", false},
		{"after the end", size, sink.Options{State: []byte("raw"), Resume: size + 1}, "at offset 1048577: want an offset from 0 to", false},
		{"before the start", size, sink.Options{State: []byte("raw"), Resume: -1}, "at offset -1: want an offset from 0 to", false},
		{"a size below 0", -5, sink.Options{}, "which has -5 bytes", false},
		{"unknown size", sink.UnknownSize, sink.Options{State: []byte("raw"), Resume: size}, "", false},
		{"without a state", size, sink.Options{Resume: 512}, "at offset 512: the state of the checkpoint is missing", false},
		{"another state", size, sink.Options{State: []byte("nbd"), Resume: 512}, `it records "nbd", want "raw"`, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			err := c.o.CheckResume(c.size, []byte("raw"))
			switch {
			case c.fails == "" && err != nil:
				t.Error(err)
			case c.fails != "" && (err == nil || !strings.Contains(err.Error(), c.fails)):
				t.Errorf("error %v, want %q in it", err, c.fails)
			case errors.Is(err, sink.ErrUnfit) != c.unfit:
				t.Errorf("error %v: it wraps ErrUnfit: %v, want %v", err, !c.unfit, c.unfit)
			}
		})
	}
}
