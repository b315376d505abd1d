package progress

import (
	"fmt"
	"strings"
	"time"

	"github.com/vddkcp/vddkcp/internal/bytesize"
)

// Closing is what the last line of a copy says. Its method String returns the text, such as
// "48.8 MiB in 6 s (8.1 MiB/s), verified".
type Closing struct {
	Copied  int64         // bytes that were read from the source and written to the target
	Shared  int64         // bytes whose blocks the target shares with the source
	Earlier int64         // the offset at which the copy continued an earlier one; 0: it did not
	Took    time.Duration // of this run
	// Verified says that the target was read back, and Places how many places of it were compared
	// with the source again.
	Verified bool
	Places   int
}

// String returns the closing line without the name of the copy.
func (c Closing) String() string {
	var b strings.Builder
	switch {
	case c.Copied == 0 && c.Shared > 0:
		fmt.Fprintf(&b, "%s shared with the source", bytesize.Format(c.Shared))
	case c.Shared > 0:
		fmt.Fprintf(&b, "%s and %s shared with the source", bytesize.Format(c.Copied), bytesize.Format(c.Shared))
	default:
		b.WriteString(bytesize.Format(c.Copied))
	}
	fmt.Fprintf(&b, " in %s", spoken(c.Took))
	if seconds := c.Took.Seconds(); c.Copied > 0 && seconds >= 0.1 {
		fmt.Fprintf(&b, " (%s/s)", bytesize.Format(int64(float64(c.Copied)/seconds)))
	}
	if c.Earlier > 0 {
		fmt.Fprintf(&b, ", continued at %s", bytesize.Format(c.Earlier))
	}
	if c.Verified {
		b.WriteString(", verified")
	}
	if c.Places > 0 {
		fmt.Fprintf(&b, ", %d places checked", c.Places)
	}
	return b.String()
}

// spoken returns a duration as text, such as "0.4 s", "6 s", "1 min 20 s" or "3 h 5 min".
func spoken(d time.Duration) string {
	switch rounded := d.Round(time.Second); {
	case d < 100*time.Millisecond:
		return "less than 0.1 s"
	case d < 10*time.Second && d.Round(100*time.Millisecond)%time.Second != 0:
		return fmt.Sprintf("%.1f s", d.Seconds())
	case rounded < time.Minute:
		return fmt.Sprintf("%d s", int(rounded.Seconds()))
	case rounded < time.Hour:
		return fmt.Sprintf("%d min %d s", int(rounded.Minutes()), int(rounded.Seconds())%60)
	}
	rounded := d.Round(time.Minute)
	return fmt.Sprintf("%d h %d min", int(rounded.Hours()), int(rounded.Minutes())%60)
}
