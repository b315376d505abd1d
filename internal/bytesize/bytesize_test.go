package bytesize

import "testing"

func TestParse(t *testing.T) {
	for _, c := range []struct {
		in   string
		want int64 // -1: an error
	}{
		{"0", 0}, {"512", 512}, {"512B", 512}, {"64KiB", 65536}, {"64k", 65536}, {"1MiB", 1 << 20}, {"2GiB", 2 << 30},
		{"8T", 8 << 40}, {"7EiB", 7 << 60}, {"9223372036854775807", 1<<63 - 1},
		{"", -1}, {"MiB", -1}, {"1MB", -1}, {"1.5MiB", -1}, {"-1", -1}, {"8EiB", -1}, {"9223372036854775808", -1}, {"1 MiB", -1}, {"1KiBiB", -1}, {"0x10", -1},
	} {
		got, err := Parse(c.in)
		if (err != nil) != (c.want < 0) || err == nil && got != c.want {
			t.Errorf("Parse(%q) = %d, %v; want %d", c.in, got, err, c.want)
		}
	}
}

func TestFormat(t *testing.T) {
	for _, c := range []struct {
		in   int64
		want string
	}{{0, "0 B"}, {1023, "1023 B"}, {1024, "1.0 KiB"}, {3 << 29, "1.5 GiB"}, {64 << 40, "64.0 TiB"}} {
		if got := Format(c.in); got != c.want {
			t.Errorf("Format(%d) = %q; want %q", c.in, got, c.want)
		}
	}
}

func TestExact(t *testing.T) {
	for _, c := range []struct {
		in   int64
		want string
	}{{0, "0"}, {513, "513"}, {65 << 10, "65KiB"}, {4 << 20, "4MiB"}, {1536 << 20, "1536MiB"}, {1 << 60, "1EiB"}} {
		got := Exact(c.in)
		if back, err := Parse(got); got != c.want || back != c.in || err != nil {
			t.Errorf("Exact(%d) = %q, which is %d, %v; want %q", c.in, got, back, err, c.want)
		}
	}
}
