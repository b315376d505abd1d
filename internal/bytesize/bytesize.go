// Package bytesize parses and formats sizes in bytes, as users write them on the command line.
package bytesize

import (
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"
)

var units = []struct {
	name  string
	bytes int64
}{
	{"EiB", 1 << 60}, {"PiB", 1 << 50}, {"TiB", 1 << 40}, {"GiB", 1 << 30}, {"MiB", 1 << 20}, {"KiB", 1 << 10},
}

// Parse parses a size in bytes: a whole number, alone or with one of the units B, K,
// KiB, M, MiB, G, GiB, T, TiB, P, PiB, E and EiB in upper or lower case. All units are
// powers of 1024. "MB" is an error, because it can mean 1000 or 1024 kilobytes.
func Parse(s string) (int64, error) {
	digits := strings.TrimRight(s, "BbKkMmGgTtPpEeIi")
	unit := strings.ToLower(s[len(digits):])
	factor := int64(1)
	if unit != "" && unit != "b" {
		factor = 0
		for _, u := range units {
			if name := strings.ToLower(u.name); unit == name || unit == name[:1] {
				factor = u.bytes
			}
		}
		if factor == 0 {
			return 0, fmt.Errorf("size %q: unknown unit %q; write for example 512, 64KiB, 1MiB or 2GiB", s, s[len(digits):])
		}
	}
	n, err := strconv.ParseUint(digits, 10, 63)
	if errors.Is(err, strconv.ErrRange) {
		return 0, fmt.Errorf("the size %.40q is 8 EiB or more", s)
	}
	if err != nil {
		return 0, fmt.Errorf("size %q: want a whole number of bytes; write for example 512, 64KiB, 1MiB or 2GiB", s)
	}
	if int64(n) > math.MaxInt64/factor {
		return 0, fmt.Errorf("the size %q is 8 EiB or more", s)
	}
	return int64(n) * factor, nil
}

// Format returns n bytes as a text for people, with one decimal: "1.5 GiB". Less than 1 KiB is
// written in bytes: "512 B".
func Format(n int64) string {
	for _, u := range units {
		if n >= u.bytes {
			return fmt.Sprintf("%.1f %s", float64(n)/float64(u.bytes), u.name)
		}
	}
	return fmt.Sprintf("%d B", n)
}

// Exact returns n bytes as a text that Parse accepts, with the largest unit that gives a whole number:
// "4MiB", "65KiB" or "513".
func Exact(n int64) string {
	for _, u := range units {
		if n >= u.bytes && n%u.bytes == 0 {
			return strconv.FormatInt(n/u.bytes, 10) + u.name
		}
	}
	return strconv.FormatInt(n, 10)
}

// Size is a number of bytes. In flags and JSON fields it is written with a unit.
type Size int64

// UnmarshalText implements encoding.TextUnmarshaler. It accepts what Parse accepts.
func (s *Size) UnmarshalText(text []byte) error {
	n, err := Parse(string(text))
	*s = Size(n)
	return err
}
