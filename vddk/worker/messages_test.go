package worker

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/vddkcp/vddkcp/internal/peer"
)

func compile(t testing.TB, args ...string) string {
	t.Helper()
	peer.Need(t, "gcc")
	// go test runs a cached test again only if files have changed that the test itself reads,
	// and not those that gcc reads.
	sources, _ := filepath.Glob("program/*")
	for _, f := range append(sources, "testdata/layout.c", "testdata/fuzz_message.c") {
		if _, err := os.ReadFile(f); err != nil {
			t.Fatal(err)
		}
	}
	out := filepath.Join(t.TempDir(), "program")
	peer.Run(t, "gcc", append([]string{"-std=gnu11", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Werror", "-o", out}, args...)...)
	return out
}

// The constants and functions in the sources of the worker are those of this package.
func TestLayout(t *testing.T) {
	want := map[string]int{
		"MSG_INIT": kindInit, "MSG_OPEN": kindOpen, "MSG_CLEANUP": kindCleanup, "MSG_END_ACCESS": kindEndAccess, "MSG_QUERY": kindQuery,
		"MSG_CLOSE": kindClose, "MSG_READ": kindRead, "MSG_WRITE": kindWrite, "MSG_FLUSH": kindFlush, "MSG_TEXT": kindText, "MSG_PREPARE_ACCESS": kindPrepareAccess,
		"MSG_DONE": kindDone, "MSG_BLOCKS": kindBlocks, "MSG_LOG": kindLog, "MSG_FATAL": kindFatal,
		"SOCKET_FD": socketFD, "ARENA_FD": arenaFD, "PROGRAM_FD": programFD,
		"MAX_SLOTS": MaxSlots, "MAX_SLOT_SIZE": MaxSlotSize, "MAX_CHUNKS": MaxChunks, "MIN_CHUNK": MinChunk, "MAX_LINE": MaxLine, "SECTOR": SectorSize,
		"SLOT_FLUSH": slotFlush, "SLOT_CONTROL": slotControl, "MAX_PACKET": maxPacket, "MAX_PAYLOAD": maxPayload,
		"DONE_LIBRARY": doneLibrary, "DONE_FAULT": doneFault,
		"LEVEL_INFO": int(Info), "LEVEL_WARNING": int(Warning), "LEVEL_PANIC": int(Panic), "LOGIN_STRINGS": loginStrings,
		"message.kind": 0, "message.slot": 4, "message.sector": 8, "message.sectors": 16, "message.flags": 24, "message.length": 28,
		"opened_numbers.capacity": 0, "opened_numbers.bios": 8, "opened_numbers.physical": 20, "opened_numbers.adapter": 32,
		"opened_numbers.links": 36, "opened_numbers.logical_sector": 40, "opened_numbers.physical_sector": 44,
		"sizeof(struct message)": headSize, "sizeof(struct init_numbers)": initNumbersSize, "sizeof(struct login_numbers)": loginNumbersSize,
		"sizeof(struct opened_numbers)": openedNumbersSize, "sizeof(Block)": blockSize,
	}
	i := 0
	for line := range strings.Lines(peer.Run(t, compile(t, "testdata/layout.c"))) {
		cut := strings.LastIndexByte(strings.TrimSpace(line), ' ')
		name, value := line[:cut], strings.TrimSpace(line[cut:])
		if function, ok := strings.CutPrefix(name, "function "); ok {
			if i >= len(functions) || functions[i].name != function || functions[i].required != (value == "1") {
				t.Errorf("function %d is %s, required %s, in the worker only", i, function, value)
			}
			i++
			continue
		}
		if w, ok := want[name]; !ok || fmt.Sprint(w) != value {
			t.Errorf("%s is %s in the worker, %d here (%v)", name, value, w, ok)
		}
		delete(want, name)
	}
	if len(want) > 0 || i != len(functions) {
		t.Errorf("not in the worker: %v; %d functions, %d here", want, i, len(functions))
	}
}

// packet returns a message with its payload.
func packet(m message, payload []byte) []byte { return append(m.append(nil, len(payload)), payload...) }

func text(list ...string) []byte {
	var b []byte
	for _, s := range list {
		b = appendOptional(b, s)
	}
	return b
}

func openedPayload(capacity uint64, list ...string) []byte {
	b := binary.LittleEndian.AppendUint64(nil, capacity)
	for i := range 8 {
		b = binary.LittleEndian.AppendUint32(b, uint32(i+1))
	}
	b = binary.LittleEndian.AppendUint32(b, 4096)
	b = binary.LittleEndian.AppendUint32(b, 4097)
	return append(b, text(list...)...)
}

func blocksPayload(list ...uint64) []byte {
	var b []byte
	for _, n := range list {
		b = binary.LittleEndian.AppendUint64(b, n)
	}
	return b
}

func TestParseMessageRefuses(t *testing.T) {
	for want, b := range map[string][]byte{
		"the message is truncated: it has 31 bytes, but its head alone must have 32":                               make([]byte, 31),
		"the message of kind 64 has a payload of 2 bytes, but its head says that the payload has 1 bytes":          append(message{kind: kindDone}.append(nil, 1), 0, 0),
		"the message of kind 64 has a payload of 0 bytes, but its head says that the payload has 4294967295 bytes": message{kind: kindDone}.append(nil, -1),
		"the message is of the unknown kind 7":                                                                     packet(message{kind: kindRead}, nil),
		`the message "done" has the request number 66, expected at most 65`:                                        packet(message{kind: kindDone, slot: 66}, nil),
		`the message "done" has the flags 0x2, expected 0 or 1`:                                                    packet(message{kind: kindDone, flags: 2}, nil),
		`the message "blocks" has the request number 0, expected 65`:                                               packet(message{kind: kindBlocks}, make([]byte, 16)),
		`the message "blocks" has a payload of 15 bytes, expected a multiple of 16 bytes, the size of a block`:     packet(message{kind: kindBlocks, slot: slotControl}, make([]byte, 15)),
		`the line in the message "log" has 4001 bytes, expected at most 4000`:                                      packet(message{kind: kindLog}, make([]byte, 4001)),
		`the line in the message "fatal" has the level 3, expected at most 2`:                                      packet(message{kind: kindFatal, flags: 3}, make([]byte, 1)),
	} {
		if _, _, err := parseMessage(b); err == nil || err.Error() != want {
			t.Errorf("got  %v\nwant %s", err, want)
		}
	}
}

func TestParseStringsRefuses(t *testing.T) {
	for want, b := range map[string][]byte{
		"string 1 of the 2 strings in the message is truncated: expected its length as a number of 4 bytes, found only 3 bytes": {0, 0, 0},
		"string 2 of the 2 strings in the message is truncated: expected its length as a number of 4 bytes, found only 0 bytes": text("a"),
		"string 1 of the 2 strings in the message is truncated: expected 2 bytes and a NUL byte, found only 2 bytes":            {2, 0, 0, 0, 'a', 'b'},
		"string 1 of the 2 strings in the message is truncated: expected 4294967294 bytes and a NUL byte, found only 2 bytes":   {0xfe, 0xff, 0xff, 0xff, 'a', 'b'},
		"string 1 of the 2 strings in the message contains a NUL byte, or no NUL byte follows it":                               {2, 0, 0, 0, 'a', 0, 0},
		"string 2 of the 2 strings in the message contains a NUL byte, or no NUL byte follows it":                               append(text("a"), 1, 0, 0, 0, 'a', 'b'),
		"1 bytes follow the last string of the message, expected none":                                                          append(text("a", ""), 0),
	} {
		if _, err := parseStrings(b, 2); err == nil || err.Error() != want {
			t.Errorf("got  %v\nwant %s", err, want)
		}
	}
	if list, err := parseStrings(text("a", "", "c"), 3); err != nil || !reflect.DeepEqual(list, []string{"a", "", "c"}) {
		t.Errorf("%q %v", list, err)
	}
}

func TestParseOpened(t *testing.T) {
	o, err := parseOpened(openedPayload(maxCapacity, "p\x1b[1m", "u", "nbd"))
	want := Opened{Capacity: maxCapacity, BIOSGeometry: [3]uint32{1, 2, 3}, Geometry: [3]uint32{4, 5, 6}, Adapter: 7, Links: 8,
		LogicalSector: 4096, PhysicalSector: 0, Parent: "p [1m", UUID: "u", Transport: "nbd"}
	if err != nil || !reflect.DeepEqual(o, want) {
		t.Errorf("%+v, %v", o, err)
	}
	if _, err := parseOpened(openedPayload(maxCapacity+1, "", "", "")); err == nil {
		t.Error("a disk whose bytes no int64 counts")
	}
	if _, err := parseOpened(make([]byte, openedNumbersSize-1)); err == nil {
		t.Error("too short")
	}
}

func TestQueryAdd(t *testing.T) {
	for _, test := range []struct {
		blocks []uint64
		want   []Block
		err    bool
	}{
		{[]uint64{128, 128}, []Block{{Start: 128, Count: 128}}, false},
		{[]uint64{128, 128, 256, 128, 512, 128}, []Block{{Start: 128, Count: 256}, {Start: 512, Count: 128}}, false},
		{[]uint64{128, 896}, []Block{{Start: 128, Count: 896}}, false},
		{[]uint64{128, 897}, nil, true},
		{[]uint64{0, 128}, nil, true},
		{[]uint64{128, 0}, nil, true},
		{[]uint64{1024, 1}, nil, true},
		{[]uint64{128, 1<<64 - 1}, nil, true},
		{[]uint64{256, 128, 128, 128}, nil, true},
		{[]uint64{128, 128, 200, 128}, nil, true},
		{[]uint64{128, 1, 130, 1, 132, 1, 134, 1, 136, 1, 138, 1, 140, 1, 142, 1}, nil, true},
	} {
		q := &query{start: 128, end: 1024, next: 128, chunks: 7}
		q.add(blocksPayload(test.blocks...))
		if (q.err != nil) != test.err || !test.err && !reflect.DeepEqual(q.blocks, test.want) {
			t.Errorf("%v: %v, %v", test.blocks, q.blocks, q.err)
		}
	}
}

// FuzzMessage calls all parsers of messages from a worker with arbitrary bytes.
func FuzzMessage(f *testing.F) {
	f.Fuzz(func(t *testing.T, b []byte) {
		m, payload, err := parseMessage(b)
		if err != nil {
			return
		}
		if again := packet(m, payload); !bytes.Equal(again, b) {
			t.Fatalf("%x parsed and written is %x", b, again)
		}
		for count := range 5 {
			if list, err := parseStrings(payload, count); err == nil && len(list) != count {
				t.Fatalf("%d strings, want %d", len(list), count)
			}
		}
		if o, err := parseOpened(payload); err == nil && o.Capacity > maxCapacity {
			t.Fatalf("capacity %d", o.Capacity)
		}
		q := &query{start: 128, end: 1 << 40, next: 128, chunks: 100}
		q.add(payload)
		at := q.start
		for i, b := range q.blocks {
			if b.Start < at || i > 0 && b.Start == at || b.Count == 0 || b.Start+b.Count > q.end {
				t.Fatalf("blocks %v", q.blocks)
			}
			at = b.Start + b.Count
		}
		line := clean(string(payload))
		if strings.ContainsAny(line, "\x00\n\r\x1b") {
			t.Fatalf("%q", line)
		}
	})
}

// parser is a process with the parser of the worker, under AddressSanitizer and UBSan.
type parser struct {
	in     io.WriteCloser
	out    *bufio.Reader
	stderr bytes.Buffer
}

func startParser(t testing.TB) *parser {
	cmd := exec.Command(compile(t, "-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "testdata/fuzz_message.c", "program/message.c"))
	p := &parser{}
	cmd.Stderr = &p.stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	p.in, p.out = in, bufio.NewReader(out)
	t.Cleanup(func() {
		in.Close()
		if err := cmd.Wait(); err != nil {
			t.Errorf("parser: %v\n%s", err, &p.stderr)
		}
	})
	return p
}

func (p *parser) valid(t testing.TB, b []byte) bool {
	if _, err := p.in.Write(append(binary.LittleEndian.AppendUint32(nil, uint32(len(b))), b...)); err != nil {
		t.Fatalf("parser: %v\n%s", err, &p.stderr)
	}
	verdict, err := p.out.ReadByte()
	if err != nil {
		t.Fatalf("parser: %v\n%s", err, &p.stderr)
	}
	return verdict == '1'
}

// requests returns valid messages to a worker.
func requests() [][]byte {
	login := appendLogin(nil, &OpenRequest{Path: "[ds] a/a.vmdk", Server: "s", User: "u", Password: "", Identity: "i", ReadOnly: true})
	control := func(kind uint32, payload []byte) []byte {
		return packet(message{kind: kind, slot: slotControl}, payload)
	}
	return [][]byte{
		control(kindInit, appendInit(nil, &Config{Library: "/l.so", Root: "/", ConfigFile: "c", Version: 8, Slots: 4, SlotSize: 1 << 20})),
		control(kindInit, appendInit(nil, &Config{Library: "/l.so", Root: "", Slots: 64, SlotSize: 4096})),
		control(kindOpen, login),
		control(kindOpen, appendLogin(nil, &OpenRequest{Path: "/local.vmdk"})),
		control(kindCleanup, login),
		control(kindPrepareAccess, login),
		control(kindEndAccess, login),
		control(kindClose, nil),
		packet(message{kind: kindQuery, slot: slotControl, sector: 256, sectors: 1280, flags: 128}, nil),
		packet(message{kind: kindQuery, slot: slotControl, sectors: 1 << 50, flags: 1 << 31}, nil),
		packet(message{kind: kindRead, slot: 63, sector: 1 << 53, sectors: 4096}, nil),
		packet(message{kind: kindWrite, slot: 0, sectors: 1}, nil),
		packet(message{kind: kindFlush, slot: slotFlush}, nil),
		packet(message{kind: kindText, slot: slotFlush, sector: 1<<64 - 1}, nil),
	}
}

func TestWorkerParsesRequests(t *testing.T) {
	p := startParser(t)
	for i, b := range requests() {
		if !p.valid(t, b) || !validRequest(b) {
			t.Errorf("request %d is refused: %q", i, b)
		}
	}
	control := func(kind uint32, payload []byte) []byte {
		return packet(message{kind: kind, slot: slotControl}, payload)
	}
	login := appendLogin(nil, &OpenRequest{Path: "p"})
	open := appendLogin(nil, &OpenRequest{Path: "p", Identity: "i"})
	for name, b := range map[string][]byte{
		"empty":                     nil,
		"short":                     requests()[0][:31],
		"cut":                       requests()[0][:60],
		"long":                      append(requests()[2], 0),
		"answer":                    packet(message{kind: kindDone}, nil),
		"kind 0":                    packet(message{}, nil),
		"no library":                control(kindInit, append(make([]byte, initNumbersSize), text("", "", "")...)),
		"65 slots":                  control(kindInit, appendInit(nil, &Config{Library: "l", Root: "r", Slots: 65, SlotSize: 4096})),
		"odd slot size":             control(kindInit, appendInit(nil, &Config{Library: "l", Root: "r", Slots: 1, SlotSize: 4097})),
		"no path":                   control(kindOpen, appendLogin(nil, &OpenRequest{Server: "s"})),
		"no identity":               control(kindEndAccess, login),
		"no identity to prepare":    control(kindPrepareAccess, login),
		"NUL in a string":           control(kindOpen, appendLogin(nil, &OpenRequest{Path: "a\x00b"})),
		"string without its end":    control(kindOpen, open[:len(open)-1]),
		"string longer than all":    control(kindOpen, append(open[:len(open)-5:len(open)-5], 0xfe, 0xff, 0xff, 0xff)),
		"a byte behind the strings": control(kindOpen, append(open[:len(open):len(open)], 0)),
		"one string too few":        control(kindOpen, login[:len(login)-4]),
		"wrong number":              packet(message{kind: kindOpen, slot: 3}, login),
		"read of slot 64":           packet(message{kind: kindRead, slot: 64, sectors: 1}, nil),
		"read of nothing":           packet(message{kind: kindRead}, nil),
		"read too long":             packet(message{kind: kindRead, sectors: 4097}, nil),
		"read that wraps":           packet(message{kind: kindRead, sectors: 2, sector: 1<<64 - 1}, nil),
		"read with payload":         packet(message{kind: kindRead, sectors: 1}, []byte{1}),
		"query odd chunk":           packet(message{kind: kindQuery, slot: slotControl, sectors: 384, flags: 192}, nil),
		"query unaligned":           packet(message{kind: kindQuery, slot: slotControl, sector: 1, sectors: 128, flags: 128}, nil),
		"query too long":            packet(message{kind: kindQuery, slot: slotControl, sectors: 128 * (MaxChunks + 1), flags: 128}, nil),
		"query that wraps":          packet(message{kind: kindQuery, slot: slotControl, sector: 1<<64 - 128, sectors: 128, flags: 128}, nil),
		"flush of a slot":           packet(message{kind: kindFlush}, nil),
		"text of control":           packet(message{kind: kindText, slot: slotControl}, nil),
	} {
		if p.valid(t, b) || validRequest(b) {
			t.Errorf("%s is accepted", name)
		}
	}
}

// validRequest is request_valid of program/message.c in Go. The fuzzer sees only the branches of Go
// code, and finds the corresponding inputs for the C code this way.
func validRequest(b []byte) bool {
	if len(b) < headSize || len(b) > maxPacket || int(binary.LittleEndian.Uint32(b[28:])) != len(b)-headSize {
		return false
	}
	kind, slot, flags := binary.LittleEndian.Uint32(b), binary.LittleEndian.Uint32(b[4:]), uint64(binary.LittleEndian.Uint32(b[24:]))
	sector, sectors := binary.LittleEndian.Uint64(b[8:]), binary.LittleEndian.Uint64(b[16:])
	payload := b[headSize:]
	given := func(skip, count int) []bool { // which strings are not NULL; nil if they are malformed
		if len(payload) < skip {
			return nil
		}
		if _, err := parseStrings(payload[skip:], count); err != nil {
			return nil
		}
		list := make([]bool, count)
		rest := payload[skip:]
		for i := range list {
			n := binary.LittleEndian.Uint32(rest)
			list[i], rest = n != noString, rest[4:]
			if list[i] {
				rest = rest[n+1:]
			}
		}
		return list
	}
	inside := sectors < 1<<55 && sector <= (1<<64-1)/SectorSize-sectors
	switch kind {
	case kindInit:
		s := given(initNumbersSize, 3)
		if s == nil || slot != slotControl {
			return false
		}
		slots, size := binary.LittleEndian.Uint32(payload[4:]), binary.LittleEndian.Uint32(payload[8:])
		return s[0] && s[1] && slots >= 1 && slots <= MaxSlots && size > 0 && size <= MaxSlotSize && size%4096 == 0
	case kindOpen, kindCleanup, kindPrepareAccess, kindEndAccess:
		s := given(loginNumbersSize, loginStrings)
		return s != nil && slot == slotControl && (kind != kindOpen || s[0]) && (kind != kindEndAccess && kind != kindPrepareAccess || s[9])
	case kindQuery:
		return len(payload) == 0 && slot == slotControl && flags >= MinChunk && flags&(flags-1) == 0 &&
			sector%flags == 0 && sectors%flags == 0 && sectors > 0 && sectors/flags <= MaxChunks && inside
	case kindClose:
		return len(payload) == 0 && slot == slotControl
	case kindRead, kindWrite:
		return len(payload) == 0 && slot < MaxSlots && sectors > 0 && sectors <= MaxSlotSize/SectorSize && inside
	case kindFlush:
		return len(payload) == 0 && slot == slotFlush
	case kindText:
		return len(payload) == 0 && slot <= slotFlush
	}
	return false
}

// FuzzRequest calls the worker's parser of requests with arbitrary bytes.
func FuzzRequest(f *testing.F) {
	p := startParser(f)
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) > maxPacket+8 {
			return
		}
		if got, want := p.valid(t, b), validRequest(b); got != want {
			t.Errorf("%x: valid is %v in the worker, %v here", b, got, want)
		}
	})
}
