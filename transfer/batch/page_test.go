package batch_test

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"vddkcp/transfer"
	"vddkcp/transfer/batch"
)

// nightOf is the report of so many jobs, some of which failed, with names and
// errors that are HTML.
func nightOf(jobs int) *batch.Report {
	begun := time.Date(2026, 11, 24, 22, 0, 0, 0, time.UTC)
	r := &batch.Report{Version: 1, Status: transfer.StatusFailed, Exit: 4, Started: begun, Finished: begun.Add(time.Duration(jobs) * time.Minute)}
	for i := range jobs {
		t := transfer.NewReport("[ds1] web/web.vmdk", "/images/"+strings.Repeat("long-folder/", 8)+fmt.Sprint(i, ".qcow2"))
		t.End(transfer.StatusOK, 0)
		t.Started, t.Finished = begun.Add(time.Duration(i)*time.Minute), begun.Add(time.Duration(i+4)*time.Minute)
		t.Seconds, t.VirtualSize, t.BytesRead, t.BytesWritten, t.Retries = 240, 40<<30, int64(i)<<28, int64(i)<<27, int64(i%3)
		j := &batch.JobReport{Name: fmt.Sprintf("web%02d/disk ü", i), Labels: map[string]string{"wave": "1", "<i>": `"`}, Attempts: 1 + i%2, Report: t}
		r.Counts.Done++
		switch i % 10 {
		case 3:
			t.Status, t.Exit, t.Error, t.Hint = transfer.StatusFailed, 75, `read </p><script>alert("x")</script> & 'y'`, `<b onclick="x">--resume</b>`
			j.Name = fmt.Sprintf(`<script>alert(%d)</script> "'&`, i)
			r.Counts.Done--
			r.Counts.Failed++
		case 7:
			t.Warnings = []string{"<img src=x onerror=alert(1)>"}
		case 9:
			t.Status, t.Error = transfer.StatusSkipped, "not started"
			r.Counts.Done--
			r.Counts.Skipped++
		}
		r.Jobs = append(r.Jobs, j)
	}
	return r
}

func pageOf(t *testing.T, r *batch.Report) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "r.HTML")
	if err := r.Write(path); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

func TestPage(t *testing.T) {
	page := pageOf(t, nightOf(30))
	for _, want := range []string{
		`<h1 class="failed">24 of 30 disks are copied, 3 failed, 3 not started</h1>`,
		"&lt;script&gt;alert(3)&lt;/script&gt; &#34;&#39;&amp;",
		"read &lt;/p&gt;&lt;script&gt;alert(&#34;x&#34;)&lt;/script&gt; &amp; &#39;y&#39;",
		"&lt;b onclick=&#34;x&#34;&gt;--resume&lt;/b&gt;",
		"&lt;img src=x onerror=alert(1)&gt;",
		"&lt;i&gt;=&#34;", "web29/disk ü", "failed, exit 75", "30 reads tried again", "prefers-color-scheme: dark", "Exit status 4.",
	} {
		if !strings.Contains(page, want) {
			t.Errorf("the page lacks %q", want)
		}
	}
	for _, never := range []string{"<script", "onclick=\"", "<img", "http:", "https:", "url(", "@import", " src=", " href="} {
		without := strings.ReplaceAll(page, "&lt;img src=x", "")
		if strings.Contains(without, never) {
			t.Errorf("the page has %q", never)
		}
	}
	if n := strings.Count(page, "<rect"); n != 27 {
		t.Errorf("%d bars, want one for each of 27 jobs that ran", n)
	}
	if n := strings.Count(page, `<tr id="job-`); n != 30 {
		t.Errorf("%d rows, want 30", n)
	}
	// All is inside of the drawing.
	for _, m := range regexp.MustCompile(`x="([0-9.]+)" y="([0-9.]+)" width="([0-9.]+)"`).FindAllStringSubmatch(page, -1) {
		var x, y, width float64
		fmt.Sscan(m[1], &x)
		fmt.Sscan(m[2], &y)
		fmt.Sscan(m[3], &width)
		if x+width > 1001.5 || y > 27*16 {
			t.Errorf("a bar at %s", m[0])
		}
	}
}

func TestPageOfLittleAndMuch(t *testing.T) {
	if page := pageOf(t, &batch.Report{Version: 1, Status: transfer.StatusOK}); !strings.Contains(page, "All 0 disks are copied") || strings.Contains(page, "<svg") {
		t.Errorf("of nothing: %s", page)
	}
	much := pageOf(t, nightOf(5000))
	if len(much) > 10<<20 || strings.Count(much, "<rect") != 4500 {
		t.Errorf("of 5000 jobs: %d bytes, %d bars", len(much), strings.Count(much, "<rect"))
	}
}
