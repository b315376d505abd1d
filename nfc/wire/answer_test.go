package wire

import (
	"math"
	"testing"
)

func TestServerMessages(t *testing.T) {
	m := new(Message)
	copy(m[:], unhex(t, "24000000 00000000 00000000 00000000 01000000"))
	if m.Type() != HelloReply || !m.HasFrames() {
		t.Errorf("got %v, frames %v", m.Type(), m.HasFrames())
	}
	m[16] = 2
	if m.HasFrames() {
		t.Error("2 at offset 16: got frames, want none")
	}

	m = new(Message)
	copy(m[:], unhex(t, "33000000 09000000 02000000"))
	if major, minor := m.ServerVersion(); m.Type() != Version || major != 9 || minor != 2 {
		t.Errorf("got %v, version %d.%d, want 9.2", m.Type(), major, minor)
	}

	for _, test := range []struct {
		digits  string
		size    int
		problem string
	}{
		{"14000000 05000000 06000000 07000000", 7, ""},
		{"14000000 05000000 06000000 00000000", 0, ""},
		{"14000000 05000000 06000000 00000100", MaxText, ""},
		{"14000000 05000000 06000000 01000100", 0, "expected an error text of at most 65536 bytes, found a length of 65537 bytes (bytes 14 00 00 00 05 00 00 00 06 00 00 00 01 00 01 00)"},
		{"14000000 05000000 06000000 ffffffff", 0, "a length of 4294967295 bytes"},
	} {
		copy(m[:], unhex(t, test.digits))
		kind, code, size, err := m.ServerError()
		checkError(t, err, test.problem)
		if m.Type() != NFCError || kind != 5 || code != 6 || size != test.size {
			t.Errorf("%s: got %v, kind %d, code %d, text of %d bytes", test.digits, m.Type(), kind, code, size)
		}
	}
}

func TestClientRandom(t *testing.T) {
	token := string(counting(64))
	m := NewClientRandom(token)
	if got := string(m[4:68]); got != token || m[68] != 0 {
		t.Errorf("got % x", m)
	}
	for _, token := range []string{"", string(counting(65))} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("a token of %d bytes: want a panic", len(token))
				}
			}()
			NewClientRandom(token)
		}()
	}
}

func TestHeader(t *testing.T) {
	b := [HeaderSize]byte(unhex(t, "7ada00a1 0b000000 04030201 08070605"))
	got, err := ParseHeader(&b)
	checkError(t, err, "")
	want := Header{Type: DDBGet, Size: 0x01020304, OpID: 0x05060708}
	if got != want {
		t.Errorf("got %v, want %v", got, want)
	}
	checkBytes(t, want.Append([]byte{1})[1:], b[:])
	b[3] = 0xa2
	_, err = ParseHeader(&b)
	checkError(t, err, "expected a frame that begins with the number 0xa100da7a, found the number 0xa200da7a (bytes 7a da 00 a2 0b")
}

func TestSizes(t *testing.T) {
	fixed := map[FrameType]int{Error: 16, OpenSession: 16, OpenFile: 60, IO: 44, SetSockOpts: 12, DDBGet: 16, SetResPool: 4}
	for kind := range FrameType(100) {
		want, wantFixed := fixed[kind]
		if size, ok := PayloadSize(kind); size != want || ok != wantFixed {
			t.Errorf("%v: got %d, %v, want %d, %v", kind, size, ok, want, wantFixed)
		}
	}
	// The answer to a request has a payload of the request's size.
	for _, r := range []Request{NewOpenSession(0, 0), NewOpenFile("", 0), NewSockOpts(), NewDDBGet(0, ""), NewResPool()} {
		if size, _ := PayloadSize(r.Type); size != len(r.Payload) {
			t.Errorf("%v: got %d bytes, want %d", r.Type, size, len(r.Payload))
		}
	}
	h := Header{Type: OpenFile, Size: 60, OpID: 3}
	checkError(t, h.CheckSize(60), "")
	checkError(t, h.CheckSize(61), "expected a payload of 61 bytes in the answer OPEN_FILE (4) with opId 3, found a payload of 60 bytes")
	h.Size = math.MaxUint32
	checkError(t, h.CheckSize(-1), "found a payload of 4294967295 bytes")
}

func TestOpenFile(t *testing.T) {
	answer := func(status, capacity string) string {
		return status + `8877665544332281 02000000 1e000000 ffffffff` + capacity + `00020000 0a000000 0b000000 0c000000 ffffffff ffffffff`
	}
	good := OpenedFile{Handle: 0x8122334455667788, Flags: 0x1e, SectorSize: 512, Geometry: [3]uint32{10, 11, 12}}
	const zero = "0000000000000000"
	tests := []struct {
		name, digits string
		capacity     int64
		status       uint64
		problem      string
	}{
		{name: "good", digits: answer(zero, "0002030405060000"), capacity: 0x060504030200},
		{name: "one sector", digits: answer(zero, "0002000000000000"), capacity: 512},
		{name: "largest", digits: answer(zero, "0000000000000010"), capacity: 1 << 60},
		{name: "too large", digits: answer(zero, "0002000000000010"), problem: "found a disk of 1152921504606847488 bytes (bytes 00 00"},
		{name: "huge", digits: answer(zero, "00feffffffffffff"), problem: "found a disk of 18446744073709551104 bytes"},
		{name: "empty", digits: answer(zero, zero), problem: "expected a disk of at least 512 and at most 2^60 bytes, a multiple of 512, found a disk of 0 bytes"},
		{name: "odd", digits: answer(zero, "0003000000000000"), problem: "found a disk of 768 bytes"},
		{name: "refused", digits: answer("0807060504030201", "0100000000000000"), status: 0x0102030405060708},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			got, err := ParseOpenFile((*[60]byte)(unhex(t, test.digits)))
			checkError(t, err, test.problem)
			want := good
			want.Capacity, want.Status = test.capacity, test.status
			if test.problem != "" {
				want = OpenedFile{}
			}
			if got != want {
				t.Errorf("got %+v, want %+v", got, want)
			}
		})
	}
}

func TestDDBGet(t *testing.T) {
	tests := []struct {
		digits  string
		want    int
		problem string
	}{
		{"ffffffff ffffffff ffffffff 00000000", 0, ""},
		{"00000000 00000000 00000000 02010000", 0x102, ""},
		{"00000000 00000000 00000000 00000100", MaxText, ""},
		{"00000000 00000000 00000000 01000100", 0, "expected an entry of the disk's descriptor of at most 65536 bytes, found a length of 65537 bytes"},
		{"00000000 00000000 00000000 000000", 0, "expected a payload of 16 bytes in the answer DDB_GET (11), found 15 bytes (bytes 00"},
		{"00000000 00000000 00000000 00000000 00", 0, "found 17 bytes"},
		{"", 0, "found 0 bytes"},
	}
	for _, test := range tests {
		got, err := ParseDDBGet(unhex(t, test.digits))
		checkError(t, err, test.problem)
		if got != test.want {
			t.Errorf("%s: got %d, want %d", test.digits, got, test.want)
		}
	}
}

func TestFailure(t *testing.T) {
	tests := []struct {
		digits  string
		want    Failure
		problem string
	}{
		{"0b00000000000000 00000000 05000000", Failure{11, 5}, ""},
		{"0807060504030201 ffffffff 00000000", Failure{0x0102030405060708, 0}, ""},
		{"0b00000000000000 00000000 00000100", Failure{11, MaxText}, ""},
		{"0b00000000000000 00000000 01000100", Failure{11, 0}, "expected an error text of at most 65536 bytes, found a length of 65537 bytes (bytes 0b 00"},
	}
	for _, test := range tests {
		got, err := ParseFailure((*[16]byte)(unhex(t, test.digits)))
		checkError(t, err, test.problem)
		if got != test.want {
			t.Errorf("%s: got %+v, want %+v", test.digits, got, test.want)
		}
	}
}
