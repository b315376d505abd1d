package open

import (
	"strconv"
	"strings"

	"github.com/vddkcp/vddkcp/internal/usage"
)

// parseCompress splits the text of a compression option, METHOD or METHOD:LEVEL,
// into its parts. If the text has no level, the returned level is 0.
func parseCompress(s string) (method string, level int, err error) {
	method, text, leveled := strings.Cut(s, ":")
	switch method {
	case "none", "zlib", "zstd":
	default:
		return "", 0, usage.Errorf("--compress %s: want none, zlib or zstd, or zlib:LEVEL or zstd:LEVEL", s)
	}
	if !leveled {
		return method, 0, nil
	}
	if level, err = strconv.Atoi(text); err != nil || level < 1 || method == "none" {
		return "", 0, usage.Errorf("--compress %s: invalid level, want zlib:LEVEL or zstd:LEVEL with a LEVEL of at least 1", s)
	}
	return method, level, nil
}
