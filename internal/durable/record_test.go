package durable_test

import (
	"bytes"
	"encoding/hex"
	"errors"
	"slices"
	"testing"

	"github.com/vddkcp/vddkcp/internal/durable"
)

var formats = []durable.Record{
	{Magic: "some magic", Version: 3, SlotSize: 64},
	{Magic: "some magic", Version: 3, SlotSize: 64, Numbered: true},
}

// TestRecordBytes tests that the format of a record does not change, because existing
// files have it.
func TestRecordBytes(t *testing.T) {
	for i, want := range []string{
		"736f6d65206d61676963" + "03000000" + "02000000" + "4f98276c" + "6869",
		"736f6d65206d61676963" + "03000000" + "02000000" + "0700000000000000" + "af6e796e" + "6869",
	} {
		if got := hex.EncodeToString(formats[i].Encode(7, []byte("hi"))); got != want {
			t.Errorf("format %d: %s, want %s", i, got, want)
		}
	}
}

func TestRecordDecode(t *testing.T) {
	for _, r := range formats {
		slot := r.Encode(7, []byte("the payload"))
		sequence, payload, err := r.Decode(append(slices.Clone(slot), 0, 1, 2))
		if want := uint64(7); err != nil || string(payload) != "the payload" || r.Numbered && sequence != want {
			t.Errorf("%d, %q, %v", sequence, payload, err)
		}
		for i := range slot {
			damaged := slices.Clone(slot)
			damaged[i] ^= 4
			want := durable.ErrTorn
			if i < len(r.Magic) {
				want = durable.ErrNoRecord
			}
			if _, _, err := r.Decode(damaged); err != want {
				t.Errorf("byte %d damaged: %v, want %v", i, err, want)
			}
			if _, _, err := r.Decode(slot[:i]); err != durable.ErrTorn && err != durable.ErrNoRecord {
				t.Errorf("%d bytes of %d: %v", i, len(slot), err)
			}
		}
		next := r
		next.Version = 4
		var version *durable.VersionError
		if _, _, err := next.Decode(slot); !errors.As(err, &version) || version.Got != 3 || version.Want != 4 {
			t.Errorf("another version: %v", err)
		}
		if n := len(r.Encode(0, make([]byte, r.Room()))); n != r.SlotSize {
			t.Errorf("the largest record has %d bytes, want %d", n, r.SlotSize)
		}
	}
}

func TestReadSlots(t *testing.T) {
	r := &formats[1]
	first, second := r.Encode(1, []byte("one")), r.Encode(2, []byte("two"))
	file := make([]byte, 2*r.SlotSize)
	copy(file, first)
	copy(file[r.SlotSize:], second)
	for _, test := range []struct {
		name  string
		bytes []byte
		want  [2]error
	}{
		{"both", file, [2]error{nil, nil}},
		{"empty", nil, [2]error{durable.ErrNoRecord, durable.ErrNoRecord}},
		{"cut in the second", file[:r.SlotSize+len(second)-1], [2]error{nil, durable.ErrTorn}},
		{"cut in the first", file[:len(first)-1], [2]error{durable.ErrTorn, durable.ErrNoRecord}},
	} {
		slots, err := r.ReadSlots(bytes.NewReader(test.bytes))
		if err != nil || slots[0].Err != test.want[0] || slots[1].Err != test.want[1] {
			t.Errorf("%s: %v, %v, %v", test.name, slots[0].Err, slots[1].Err, err)
		}
		if slots[1].Err == nil && (slots[1].Sequence != 2 || string(slots[1].Payload) != "two" || len(slots[1].Bytes) != r.SlotSize) {
			t.Errorf("%s: %+v", test.name, slots[1])
		}
	}
}
