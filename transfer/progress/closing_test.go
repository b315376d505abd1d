package progress_test

import (
	"testing"
	"time"

	"github.com/vddkcp/vddkcp/transfer/progress"
)

func TestClosing(t *testing.T) {
	const mib = 1 << 20
	for _, c := range []struct {
		end  progress.Closing
		want string
	}{
		{progress.Closing{Copied: 51170509, Took: 6020 * time.Millisecond, Verified: true}, "48.8 MiB in 6 s (8.1 MiB/s), verified"},
		{progress.Closing{Copied: 10 * mib, Took: 400 * time.Millisecond}, "10.0 MiB in 0.4 s (25.0 MiB/s)"},
		{progress.Closing{Copied: 10 * mib, Took: 3 * time.Millisecond}, "10.0 MiB in less than 0.1 s"},
		{progress.Closing{Took: 2 * time.Second}, "0 B in 2 s"},
		{progress.Closing{Copied: 800 * mib, Took: 80 * time.Second, Earlier: 2 * mib}, "800.0 MiB in 1 min 20 s (10.0 MiB/s), continued at 2.0 MiB"},
		{progress.Closing{Shared: 10 * mib, Took: time.Second}, "10.0 MiB shared with the source in 1 s"},
		{progress.Closing{Copied: mib, Shared: 10 * mib, Took: time.Second}, "1.0 MiB and 10.0 MiB shared with the source in 1 s (1.0 MiB/s)"},
		{progress.Closing{Copied: 1 << 40, Took: 3*time.Hour + 5*time.Minute + 29*time.Second, Places: 256}, "1.0 TiB in 3 h 5 min (94.2 MiB/s), 256 places checked"},
		{progress.Closing{Copied: mib, Took: time.Hour - 200*time.Millisecond}, "1.0 MiB in 1 h 0 min (291 B/s)"},
		{progress.Closing{Copied: mib, Took: time.Minute - 200*time.Millisecond}, "1.0 MiB in 1 min 0 s (17.1 KiB/s)"},
	} {
		if got := c.end.String(); got != c.want {
			t.Errorf("%q, want %q", got, c.want)
		}
	}
}
