package batch_test

import (
	"fmt"
	"html"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/vddkcp/vddkcp/internal/peer"
	"github.com/vddkcp/vddkcp/transfer/batch"
	"github.com/vddkcp/vddkcp/transfer/report"
)

// nightOf returns a report of many jobs, of which some failed. Names and errors
// contain HTML.
func nightOf(jobs int) *batch.Report {
	begun := time.Date(2026, 11, 24, 22, 0, 0, 0, time.UTC)
	r := &batch.Report{Version: 1, Status: report.StatusFailed, Exit: 4, Started: begun, Finished: begun.Add(time.Duration(jobs) * time.Minute)}
	for i := range jobs {
		t := report.New("[ds1] web/web.vmdk", "/images/"+strings.Repeat("long-folder/", 8)+fmt.Sprint(i, ".qcow2"))
		t.End(report.StatusOK, 0)
		t.Started, t.Finished = begun.Add(time.Duration(i)*time.Minute), begun.Add(time.Duration(i+4)*time.Minute)
		t.Seconds, t.VirtualSize, t.BytesRead, t.BytesWritten, t.Retries = 240, 40<<30, int64(i)<<28, int64(i)<<27, int64(i%3)
		j := &batch.JobReport{Name: fmt.Sprintf("web%02d/disk ü", i), Labels: map[string]string{"wave": "1", "<i>": `"`}, Attempts: 1 + i%2, Report: t}
		r.Counts.Done++
		switch i % 10 {
		case 3:
			t.Status, t.Exit, t.Error, t.Hint = report.StatusFailed, 75, `read </p><script>alert("x")</script> & 'y'`, `<b onclick="x">--resume</b>`
			j.Name = fmt.Sprintf(`<script>alert(%d)</script> "'&`, i)
			r.Counts.Done--
			r.Counts.Failed++
		case 7:
			t.Warnings = []string{"<img src=x onerror=alert(1)>"}
		case 9:
			t.Status, t.Error = report.StatusSkipped, "not started"
			r.Counts.Done--
			r.Counts.Skipped++
		}
		r.Jobs = append(r.Jobs, j)
	}
	// An earlier run has copied some of the jobs, and some needed several attempts.
	r.Totals = batch.Totals{BytesRead: 7 << 40, BytesWritten: 3 << 40, Retries: 12}
	return r
}

// runningNight returns the report of a batch in the middle of a night.
func runningNight(jobs int) *batch.Report {
	r := nightOf(jobs)
	r.Status, r.Exit, r.JobFile, r.Updated = report.StatusRunning, -1, "/etc/vddkcp/jobs/wave1.json", r.Finished
	r.Totals.Rate = 310 << 20
	r.Counts = batch.Counts{}
	r.Curve = &batch.Curve{Seconds: 20}
	for i := range int(r.Finished.Sub(r.Started).Seconds() / 20) {
		r.Curve.Rates = append(r.Curve.Rates, float64(200+100*((i/9)%3)+10*(i%7))*(1<<20))
	}
	for i, j := range r.Jobs {
		j.Host, j.Via, j.Connections = fmt.Sprint("esxi", i%4, ".example.com"), "nfc", 4
		j.Waits = report.Waits{Source: 170, Target: 20}
		switch left := 3700.0; {
		case i >= jobs*2/3:
			j.Status, j.Exit, j.Error, j.Attempts, j.Warnings = report.StatusPending, -1, "", 0, nil
			r.Counts.Pending++
		case i >= jobs*2/3-4:
			j.Status, j.Exit, j.Error, j.BytesPlanned, j.Finished = report.StatusRunning, -1, "", 20<<30, r.Finished
			j.Live = &batch.Live{Phase: "copy", BytesDone: int64(i%4+1) << 32, Rate: 77 << 20, ETASeconds: &left, BoundBy: "host budget"}
			switch i % 4 {
			case 0:
				j.Live.Phase = "verify"
			case 1:
				j.Live = &batch.Live{Phase: "before"}
				j.BytesPlanned = 0
			}
			r.Counts.Running++
		case j.Status == report.StatusFailed:
			r.Counts.Failed++
		case j.Status == report.StatusSkipped:
			j.Status, j.Error = report.StatusOK, ""
			r.Counts.Done++
		default:
			r.Counts.Done++
		}
	}
	return r
}

// TestPageOfARunningBatch checks that the page loads itself again, without a script, and shows what
// runs.
func TestPageOfARunningBatch(t *testing.T) {
	r := runningNight(30)
	again := r.Jobs[25]
	again.Attempts, again.Error, again.Hint = 1, "will be tried again; attempt 1 failed: no route to host", "check the network"
	page := pageOf(t, r)
	for _, want := range []string{
		`<meta http-equiv="refresh" content="10">`, `<h1 class="running">14 of 30 disks are copied, 4 running, 2 failed, 10 waiting</h1>`,
		"Job file /etc/vddkcp/jobs/wave1.json. Running since 2026-11-24 22:00:00 UTC, updated ", "now 310.0 MiB/s", `<progress max="100" value="`,
		"1h1m40s left", "bound by host budget", "source 70%", "via esxi1.example.com, nfc, 4 connections", `<span class="number"> before command</span><span class="number"></span>`,
		`<li class="pending"><b><a href="#job-25">web25/disk ü</a></b> <span class="pending">pending</span><p>will be tried again; attempt 1 failed: no route to host</p><p class="hint">check the network</p>`, "up to ", `<span class="running">running `,
	} {
		if !strings.Contains(page, want) {
			t.Errorf("the page lacks %q", want)
		}
	}
	if strings.Contains(page, "<script") {
		t.Error("the page has a script")
	}
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
		"&lt;i&gt;=&#34;", "web29/disk ü", "failed, exit 75", "7.0 TiB read and 3.0 TiB written in 30m0s", "12 reads were tried again", "prefers-color-scheme: dark", "Exit status 4.",
	} {
		if !strings.Contains(page, want) {
			t.Errorf("the page lacks %q", want)
		}
	}
	for _, never := range []string{"<script", "onclick=\"", "<img", "http:", "https:", "url(", "@import", " src=", " href=\"h", "http-equiv"} {
		without := strings.ReplaceAll(page, "&lt;img src=x", "")
		if strings.Contains(without, never) {
			t.Errorf("the page has %q", never)
		}
	}
	// A failure leads to the row of its job.
	if !strings.Contains(page, `<a href="#job-3">&lt;script`) || !strings.Contains(page, `<tr id="job-3"`) {
		t.Error("a failure does not lead to the row of its job")
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
		if x+width > 1000.1 || y > 27*16 {
			t.Errorf("a bar at %s", m[0])
		}
	}
}

// measure is a script that a test adds to a page. It reports which elements do not
// fit, and whether the browser took a text for a script. It runs in a frame, because a
// window is never narrower than 500 pixels.
const measure = `<script>
const wide = [...document.querySelectorAll("*")].filter(e => e.getBoundingClientRect().right > innerWidth + 0.5).map(e => e.tagName)
parent.postMessage({width: innerWidth, scroll: document.documentElement.scrollWidth, wide: wide.slice(0, 5),
	scripts: document.scripts.length, rows: document.querySelectorAll("tbody tr").length, bars: document.querySelectorAll("rect").length}, "*")
</script></html>`

const frame = `<script>onmessage = e => document.documentElement.setAttribute("data-measured", JSON.stringify(e.data))</script>
<iframe src="page.html" width="%d" height="800" style="border: 0"></iframe>`

// TestPageInABrowser checks in a browser that nothing on the page is cut off, on a
// wide and on a narrow screen, and that the page has every job.
func TestPageInABrowser(t *testing.T) {
	peer.Need(t, "chromium")
	for _, c := range []struct {
		name   string
		report *batch.Report
		bars   int
	}{{"done", nightOf(30), 27}, {"running", runningNight(30), 20}} {
		page := strings.Replace(pageOf(t, c.report), "</html>", measure, 1)
		dir := t.TempDir()
		write := func(name, text string) string {
			path := filepath.Join(dir, name)
			if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
			return path
		}
		write("page.html", page)
		for _, width := range []int{1280, 400} {
			dom := peer.Run(t, "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--user-data-dir="+t.TempDir(),
				"--window-size=1400,900", "--virtual-time-budget=5000", "--dump-dom", "file://"+write("frame.html", fmt.Sprintf(frame, width)))
			m := regexp.MustCompile(`data-measured="([^"]*)"`).FindStringSubmatch(dom)
			if m == nil {
				t.Fatalf("%s: nothing was measured: %.2000s", c.name, dom)
			}
			want := fmt.Sprintf(`{"width":%d,"scroll":%[1]d,"wide":[],"scripts":1,"rows":30,"bars":%d}`, width, c.bars)
			if got := html.UnescapeString(m[1]); got != want {
				t.Errorf("%s: measured %s, want %s", c.name, got, want)
			}
		}
	}
}

// TestPageOfOneFailure checks that jobs which failed with the same error are listed
// together.
func TestPageOfOneFailure(t *testing.T) {
	r := nightOf(30)
	for _, j := range r.Jobs {
		j.Status, j.Exit, j.Error, j.Hint = report.StatusFailed, 75, "no route to host", "--resume"
	}
	r.Jobs[0].Error = "connection refused"
	r.Counts = batch.Counts{Failed: 30}
	page := pageOf(t, r)
	if strings.Count(page, "no route to host") != 1 || strings.Count(page, "connection refused") != 1 || !strings.Contains(page, `<b><a href="#job-28">web28/disk ü</a></b>, <b><a href="#job-29">web29/disk ü</a></b> <span`) || !strings.Contains(page, "None of 30 disks is copied, 30 failed") {
		t.Errorf("%s", page)
	}
}

// TestPageWithoutCurve checks that the page of a report without measured rates shows none.
func TestPageWithoutCurve(t *testing.T) {
	old := nightOf(3)
	old.Curve = nil
	if page := pageOf(t, old); strings.Contains(page, `class="rate"`) || strings.Count(page, "<rect") != 3 {
		t.Errorf("of an early version: %s", page)
	}
	copied := old.Jobs[2].Report
	if page := pageOf(t, batch.Single(copied)); strings.Contains(page, "<svg") || !strings.Contains(page, "512.0 MiB read") || !strings.Contains(page, "2 reads were tried again") {
		t.Errorf("of a single copy: %s", page)
	}
}

func TestPageOfLittleAndMuch(t *testing.T) {
	if page := pageOf(t, &batch.Report{Version: 1, Status: report.StatusOK}); !strings.Contains(page, "All 0 disks are copied") || strings.Contains(page, "<svg") {
		t.Errorf("of nothing: %s", page)
	}
	much := pageOf(t, nightOf(5000))
	if len(much) > 10<<20 || strings.Count(much, "<rect") != 4500 {
		t.Errorf("of 5000 jobs: %d bytes, %d bars", len(much), strings.Count(much, "<rect"))
	}
}
