package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"

	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/runtime"
	kubejson "k8s.io/apimachinery/pkg/runtime/serializer/json"
	"k8s.io/apimachinery/pkg/util/validation"
	"k8s.io/apimachinery/pkg/util/yaml"

	"vddkcp/internal/peer"
	"vddkcp/transfer/batch"
)

// kubernetesBatch is what is in examples/kubernetes.
type kubernetesBatch struct {
	text      string
	configMap *corev1.ConfigMap
	claim     *corev1.PersistentVolumeClaim
	job       *batchv1.Job
	report    *batchv1.Job
}

// manifests decodes the documents of a file as an API server does that refuses
// unknown and duplicate fields.
func manifests(t *testing.T, text []byte) (objects []runtime.Object) {
	t.Helper()
	scheme := runtime.NewScheme()
	if err := errors.Join(batchv1.AddToScheme(scheme), corev1.AddToScheme(scheme)); err != nil {
		t.Fatal(err)
	}
	decoder := kubejson.NewSerializerWithOptions(kubejson.DefaultMetaFactory, scheme, scheme, kubejson.SerializerOptions{Yaml: true, Strict: true})
	documents := yaml.NewDocumentDecoder(io.NopCloser(bytes.NewReader(text)))
	defer documents.Close()
	room := make([]byte, len(text)+1)
	for {
		n, err := documents.Read(room)
		if err == io.EOF {
			return objects
		}
		if err != nil {
			t.Fatal(err)
		}
		object, _, err := decoder.Decode(room[:n], nil, nil)
		if err != nil {
			t.Fatalf("document %d: %v", len(objects), err)
		}
		objects = append(objects, object)
	}
}

func readKubernetesBatch(t *testing.T) *kubernetesBatch {
	t.Helper()
	b := new(kubernetesBatch)
	for _, name := range []string{"batch.yaml", "report.yaml"} {
		text, err := os.ReadFile(filepath.Join(examples, "kubernetes", name))
		if err != nil {
			t.Fatal(err)
		}
		b.text += string(text)
		for _, object := range manifests(t, text) {
			switch o := object.(type) {
			case *corev1.ConfigMap:
				b.configMap = o
			case *corev1.PersistentVolumeClaim:
				b.claim = o
			case *batchv1.Job:
				if name == "report.yaml" {
					b.report = o
				} else {
					b.job = o
				}
			default:
				t.Fatalf("%s has a %T", name, object)
			}
		}
	}
	if b.configMap == nil || b.claim == nil || b.job == nil || b.report == nil {
		t.Fatalf("there is no ConfigMap, no PersistentVolumeClaim or no Job: %+v", b)
	}
	return b
}

// checkPod looks whether all that a pod names is there, and whether it has no
// privileges: kubernetes.io/docs/concepts/security/pod-security-standards,
// "Restricted", and a root that nobody writes to.
func (b *kubernetesBatch) checkPod(t *testing.T, name string, p *corev1.PodSpec) {
	t.Helper()
	bad := func(format string, args ...any) { t.Helper(); t.Errorf(name+": "+format, args...) }
	yes := func(b *bool) bool { return b != nil && *b }
	no := func(b *bool) bool { return b != nil && !*b }

	unused := map[string]bool{}
	for _, v := range p.Volumes {
		if unused[v.Name] || len(validation.IsDNS1123Label(v.Name)) > 0 {
			bad("volume %q: a second one of the name, or no name", v.Name)
		}
		unused[v.Name] = true
		switch {
		case v.ConfigMap != nil:
			if v.ConfigMap.Name != b.configMap.Name {
				bad("volume %s: there is no ConfigMap %s", v.Name, v.ConfigMap.Name)
			}
		case v.PersistentVolumeClaim != nil:
			if v.PersistentVolumeClaim.ClaimName != b.claim.Name {
				bad("volume %s: there is no claim %s", v.Name, v.PersistentVolumeClaim.ClaimName)
			}
		case v.Secret != nil:
			s := v.Secret
			if s.DefaultMode == nil || *s.DefaultMode != 0o400 {
				bad("volume %s: mode %v", v.Name, s.DefaultMode)
			}
			// It is not among the manifests, of course: how to make it is said.
			for _, item := range s.Items {
				if how := "kubectl create secret generic " + s.SecretName + " --from-file=" + item.Key + "\n"; !strings.Contains(b.text, how) {
					bad("volume %s: nothing says %s", v.Name, how)
				}
			}
		case v.EmptyDir != nil:
		default:
			bad("volume %s is of another kind", v.Name)
		}
	}
	pod := p.SecurityContext
	if p.HostNetwork || p.HostPID || p.HostIPC || !no(p.AutomountServiceAccountToken) || pod == nil || !yes(pod.RunAsNonRoot) ||
		pod.RunAsUser == nil || *pod.RunAsUser == 0 || pod.RunAsGroup == nil || *pod.RunAsGroup == 0 || pod.FSGroup == nil ||
		pod.SeccompProfile == nil || pod.SeccompProfile.Type != corev1.SeccompProfileTypeRuntimeDefault {
		bad("the pod has privileges: %+v", pod)
	}
	if p.RestartPolicy != corev1.RestartPolicyNever || len(p.Containers) != 1 {
		bad("restart policy %s, %d containers", p.RestartPolicy, len(p.Containers))
	}
	for _, c := range slices.Concat(p.InitContainers, p.Containers) {
		s := c.SecurityContext
		if s == nil || !no(s.AllowPrivilegeEscalation) || !yes(s.ReadOnlyRootFilesystem) || s.Capabilities == nil ||
			!slices.Contains(s.Capabilities.Drop, "ALL") || len(s.Capabilities.Add) > 0 || yes(s.Privileged) ||
			s.RunAsUser != nil || s.RunAsNonRoot != nil || s.SeccompProfile != nil {
			bad("container %s has privileges: %+v", c.Name, s)
		}
		if c.Resources.Requests.Cpu().IsZero() || c.Resources.Requests.Memory().IsZero() || c.Resources.Limits.Memory().Cmp(*c.Resources.Requests.Memory()) < 0 {
			bad("container %s: resources %+v", c.Name, c.Resources)
		}
		// A secret is a file: in the environment every child would have it.
		if len(c.EnvFrom) > 0 || slices.ContainsFunc(c.Env, func(v corev1.EnvVar) bool { return v.ValueFrom != nil || strings.HasPrefix(v.Name, "VDDKCP_") }) {
			bad("container %s: environment %+v", c.Name, c.Env)
		}
		paths := map[string]bool{}
		for _, m := range c.VolumeMounts {
			if _, ok := unused[m.Name]; !ok {
				bad("container %s: there is no volume %s", c.Name, m.Name)
			}
			unused[m.Name] = false
			if paths[m.MountPath] || !filepath.IsAbs(m.MountPath) {
				bad("container %s: %q: two mounts, or no path", c.Name, m.MountPath)
			}
			paths[m.MountPath] = true
		}
	}
	for v, not := range unused {
		if not {
			bad("no container mounts volume %s", v)
		}
	}
}

// mountedAt is the volume that a container has a path on.
func mountedAt(p *corev1.PodSpec, path string) (v *corev1.Volume, readOnly bool) {
	best := ""
	for _, m := range p.Containers[0].VolumeMounts {
		if strings.HasPrefix(path, m.MountPath+"/") && len(m.MountPath) > len(best) {
			best = m.MountPath
			for i := range p.Volumes {
				if p.Volumes[i].Name == m.Name {
					v, readOnly = &p.Volumes[i], m.ReadOnly
				}
			}
		}
	}
	return v, readOnly
}

// runLine reads the command line of a container that is vddkcp run.
func runLine(t *testing.T, c *corev1.Container) *batchCommand {
	t.Helper()
	words := containerCommand(c, nil)
	var line cli
	parser, err := newParser(&line, io.Discard, io.Discard, func(int) {})
	if err != nil {
		t.Fatal(err)
	}
	if len(words) < 2 || words[0] != "/usr/local/bin/vddkcp" || words[1] != "run" {
		t.Fatalf("command %q", words)
	}
	if _, err := parser.Parse(words[1:]); err != nil {
		t.Fatalf("command %q: %v", words, err)
	}
	if all := strings.Join(words, " "); strings.Contains(all, "$(") {
		t.Errorf("command %s has a variable that nobody sets", all)
	}
	return &line.RunJobs
}

// load reads the job file of the ConfigMap.
func (b *kubernetesBatch) load(t *testing.T) *batch.File {
	t.Helper()
	parser, err := newJobParser()
	if err != nil {
		t.Fatal(err)
	}
	spec, err := parser.spec()
	if err != nil {
		t.Fatal(err)
	}
	file, err := batch.Load(strings.NewReader(b.configMap.Data["jobs.json"]), "jobs.json", "/etc/vddkcp", spec)
	if err != nil {
		t.Fatal(err)
	}
	return file
}

// What the manifests say fits together.
func TestExampleKubernetes(t *testing.T) {
	b := readKubernetesBatch(t)
	b.checkPod(t, "batch", &b.job.Spec.Template.Spec)
	b.checkPod(t, "report", &b.report.Spec.Template.Spec)
	if !slices.Contains(b.claim.Spec.AccessModes, corev1.ReadWriteMany) {
		t.Errorf("claim: %v", b.claim.Spec.AccessModes)
	}

	file := b.load(t)
	if len(file.Warnings) > 0 {
		t.Errorf("job file: %v", file.Warnings)
	}
	spec := b.job.Spec
	if spec.Completions == nil || spec.Parallelism == nil || spec.BackoffLimitPerIndex == nil || *spec.BackoffLimitPerIndex < 1 || spec.BackoffLimit != nil ||
		spec.PodReplacementPolicy == nil || *spec.PodReplacementPolicy != batchv1.Failed {
		t.Fatalf("job: %+v", spec)
	}
	shards, together := int(*spec.Completions), int64(*spec.Parallelism)
	if limits := file.Limits; together*limits.NFCBuffer > batch.DefaultNFCBuffer || together*int64(limits.Connections) > batch.DefaultConnections || limits.PerHost == 0 {
		t.Errorf("limits %+v, of %d shards at once", limits, together)
	}
	isOn := func(p *corev1.PodSpec, path string, writable bool, kind func(*corev1.Volume) bool) {
		t.Helper()
		if v, readOnly := mountedAt(p, path); v == nil || !kind(v) || writable && readOnly {
			t.Errorf("%s is not on its volume", path)
		}
	}
	claim := func(v *corev1.Volume) bool { return v.PersistentVolumeClaim != nil }
	pod0 := pod(b.job, 0)
	for _, j := range file.Jobs {
		isOn(pod0, j.Target, true, claim)
		isOn(pod0, strings.TrimPrefix(j.Text("password"), "+"), false, func(v *corev1.Volume) bool { return v.Secret != nil })
		isOn(pod0, j.Text("libdir"), false, func(v *corev1.Volume) bool { return v.EmptyDir != nil })
		if j.Host == "" || j.Text("thumbprint") == "" {
			t.Errorf("job %s has no host or no thumbprint", j.Name)
		}
	}
	if init := pod0.InitContainers; len(init) != 1 || init[0].Command != nil || init[0].Args != nil || init[0].VolumeMounts[0].MountPath != "/opt" {
		t.Errorf("init containers %+v, want one that mounts /opt and does what its image says", init)
	}

	used := map[string]bool{}
	jobs := 0
	for index := range shards {
		p := pod(b.job, index)
		line := runLine(t, &p.Containers[0])
		if want := fmt.Sprintf("%d/%d", index, shards); line.Shard != want || !line.Resume {
			t.Errorf("index %d runs shard %s, resume %v, want %s", index, line.Shard, line.Resume, want)
		}
		isOn(p, line.Jobs, false, func(v *corev1.Volume) bool { return v.ConfigMap != nil })
		for _, path := range append([]string{line.State}, line.Report...) {
			isOn(p, path, true, claim)
			if used[path] {
				t.Errorf("index %d writes %s, which is another's", index, path)
			}
			used[path] = true
		}
		isOn(p, line.LogDir+"/x", true, claim)
		mine, err := line.selected(file)
		if err != nil {
			t.Fatal(err)
		}
		jobs += len(mine)
	}
	if jobs != len(file.Jobs) {
		t.Errorf("%d jobs are in the shards, of %d", jobs, len(file.Jobs))
	}

	merge := runLine(t, &pod(b.report, 0).Containers[0])
	isOn(&b.report.Spec.Template.Spec, merge.MergeReports+"/x", true, claim)
	for _, path := range merge.Report {
		isOn(&b.report.Spec.Template.Spec, path, true, claim)
		if filepath.Ext(path) == ".json" && filepath.Dir(path) == merge.MergeReports {
			t.Errorf("%s would be merged into the next one", path)
		}
	}
	if len(merge.Report) != 2 || b.report.Spec.BackoffLimit == nil || *b.report.Spec.BackoffLimit != 0 {
		t.Errorf("the merge: %+v", merge)
	}
}

// What becomes of an index, for each way that vddkcp ends.
func TestExampleKubernetesFailures(t *testing.T) {
	policy := readKubernetesBatch(t).job.Spec.PodFailurePolicy
	for _, c := range []struct {
		container string
		exit      int
		condition corev1.PodConditionType
		want      batchv1.PodFailurePolicyAction
	}{
		{"vddkcp", 1, "", batchv1.PodFailurePolicyActionFailIndex},
		{"vddkcp", 2, "", batchv1.PodFailurePolicyActionFailIndex},
		{"vddkcp", 4, "", batchv1.PodFailurePolicyActionFailIndex},
		{"vddkcp", 75, "", batchv1.PodFailurePolicyActionCount},
		{"vddkcp", 137, "", batchv1.PodFailurePolicyActionCount}, // the memory was too little
		{"vddkcp", 143, "", batchv1.PodFailurePolicyActionCount}, // somebody deleted the pod
		{"vddkcp", 143, corev1.DisruptionTarget, batchv1.PodFailurePolicyActionIgnore},
		{"vddkcp", 1, corev1.DisruptionTarget, batchv1.PodFailurePolicyActionIgnore},
		{"vddk", 1, "", batchv1.PodFailurePolicyActionCount}, // cp found no room
	} {
		var conditions []corev1.PodConditionType
		if c.condition != "" {
			conditions = append(conditions, c.condition)
		}
		if got := podFailed(policy, c.container, c.exit, conditions...); got != c.want {
			t.Errorf("%+v: %s", c, got)
		}
	}
}

// The image that the Dockerfile makes is the one that the pods need.
func TestExampleKubernetesDockerfile(t *testing.T) {
	text, err := os.ReadFile(filepath.Join(examples, "kubernetes/Dockerfile"))
	if err != nil {
		t.Fatal(err)
	}
	b := readKubernetesBatch(t)
	security := b.job.Spec.Template.Spec.SecurityContext
	for _, want := range []string{
		`COPY --from=build \S+ ` + b.job.Spec.Template.Spec.Containers[0].Command[0] + "\n",
		fmt.Sprintf("USER %d:%d\n", *security.RunAsUser, *security.RunAsGroup),
		"-t " + regexp.QuoteMeta(b.job.Spec.Template.Spec.Containers[0].Image) + " ",
		"FROM debian:", // glibc
	} {
		if !regexp.MustCompile(want).Match(text) {
			t.Errorf("the Dockerfile has no %s", want)
		}
	}
	if b.report.Spec.Template.Spec.Containers[0].Image != b.job.Spec.Template.Spec.Containers[0].Image {
		t.Error("the two Jobs have different images")
	}
}

// All indexes run, as the pods would: one is drained in the middle, one finds a
// wrong password, one the server down; then each is run once more, and the
// reports are merged.
func TestExampleKubernetesRuns(t *testing.T) {
	peer.NeedRoot(t)
	peer.Need(t, "qemu-img", "gcc", "cp")
	b := readKubernetesBatch(t)
	file := b.load(t)
	var disks []string
	source := map[string]string{}
	for _, j := range file.Jobs {
		disk := strings.NewReplacer("[", "", "] ", "/").Replace(j.Source)
		disks = append(disks, disk)
		source[filepath.Base(j.Target)] = disk
	}
	lib := standInServer(t, disks...)
	program, err := binary()
	if err != nil {
		t.Fatal(err)
	}

	// The library of the image does not have its script and its disks.
	standIn := filepath.Join(t.TempDir(), "standin")
	login := "user backup@vsphere.local\npassword geheim\nthumbprint " + pairs(strings.Repeat("AB", 20)) + "\n"
	script := func(more string) {
		put(t, filepath.Join(standIn, "vddktest.conf"), login+more)
		if err := os.Remove(filepath.Join(standIn, "vddktest.state")); err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Fatal(err)
		}
	}
	script("")
	if err := os.Rename(filepath.Join(lib, "disks"), filepath.Join(standIn, "disks")); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(lib, "vddktest.conf")); err != nil {
		t.Fatal(err)
	}
	user, group := int(*b.job.Spec.Template.Spec.SecurityContext.RunAsUser), int(*b.job.Spec.Template.Spec.SecurityContext.RunAsGroup)
	err = filepath.WalkDir(standIn, func(path string, _ fs.DirEntry, err error) error {
		return errors.Join(err, os.Chown(path, user, group))
	})
	if err != nil {
		t.Fatal(err)
	}

	template := b.job.Spec.Template.Spec
	images := t.TempDir()
	password := map[string]string{"password": "geheim\n"}
	k := &kubelet{
		t: t,
		images: map[string]image{
			// The program that loads libraries is in vddkcp only when make built it.
			template.Containers[0].Image: {files: map[string]string{
				"/usr/local/bin/vddkcp":             program,
				"/usr/local/bin/vddkcp-vddk-worker": filepath.Join(filepath.Dir(program), "vddkcp-vddk-worker"),
			}},
			// As KubeVirt's documentation has it built.
			template.InitContainers[0].Image: {
				files:      map[string]string{"/vmware-vix-disklib-distrib": lib, "/usr/bin/cp": "/usr/bin/cp"},
				entrypoint: []string{"/usr/bin/cp", "-r", "/vmware-vix-disklib-distrib", "/opt"},
			},
		},
		configMaps: map[string]map[string]string{b.configMap.Name: b.configMap.Data},
		secrets:    map[string]map[string]string{"vddkcp": password},
		claims:     map[string]string{b.claim.Name: images},
		extra:      map[string]string{"/standin": standIn},
		env:        []string{"VDDK_TEST_SCRIPT=/standin/vddktest.conf"},
	}
	ends := func(index, want int, action batchv1.PodFailurePolicyAction, conditions ...corev1.PodConditionType) func(result) {
		return func(r result) {
			t.Helper()
			if r.exit != want {
				t.Fatalf("index %d: exit status %d, want %d\n%s", index, r.exit, want, r.stderr)
			}
			if want == 0 {
				return
			}
			if got := podFailed(b.job.Spec.PodFailurePolicy, template.Containers[0].Name, r.exit, conditions...); got != action {
				t.Errorf("index %d: exit status %d is %s, want %s", index, r.exit, got, action)
			}
		}
	}

	// A drained node: the disk takes 20 s, and gets no more than a moment.
	script("bandwidth 0.05\n")
	ends(0, 143, batchv1.PodFailurePolicyActionIgnore, corev1.DisruptionTarget)(k.run(pod(b.job, 0), func(p *os.Process) {
		waitForFile(t, filepath.Join(images, "shard-0.state.json"), `"running"`)
		if err := p.Signal(syscall.SIGTERM); err != nil {
			t.Error(err)
		}
	}))
	script("")
	k.secrets["vddkcp"] = map[string]string{"password": "falsch\n"}
	ends(1, 1, batchv1.PodFailurePolicyActionFailIndex)(k.run(pod(b.job, 1), nil))
	k.secrets["vddkcp"] = password

	targets := func() map[string]os.FileInfo {
		all := map[string]os.FileInfo{}
		for name := range source {
			fi, err := os.Stat(filepath.Join(images, name))
			if err != nil {
				t.Fatal(err)
			}
			all[name] = fi
		}
		return all
	}
	for index := range int(*b.job.Spec.Completions) {
		ends(index, 0, "")(k.run(pod(b.job, index), nil))
	}
	for name, disk := range source {
		peer.Run(t, "qemu-img", "compare", "-F", "raw", filepath.Join(images, name), filepath.Join(standIn, "disks", disk))
	}

	// A pod that is lost after its last job is replaced, and has nothing to do: the
	// library is not even loaded.
	before := targets()
	script("")
	for index := range int(*b.job.Spec.Completions) {
		ends(index, 0, "")(k.run(pod(b.job, index), nil))
	}
	for name, fi := range targets() {
		if !os.SameFile(fi, before[name]) || !fi.ModTime().Equal(before[name].ModTime()) {
			t.Errorf("%s was copied again", name)
		}
	}
	if _, err := os.Stat(filepath.Join(standIn, "vddktest.state")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the library was used: %v", err)
	}

	for range 2 { // the second one must not take the first one's for a shard's
		ends(0, 0, "")(k.run(pod(b.report, 0), nil))
	}
	var r batch.Report
	text, err := os.ReadFile(filepath.Join(images, "logs/report.json"))
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(text, &r); err != nil {
		t.Fatal(err)
	}
	var names, want []string
	for _, j := range r.Jobs {
		names = append(names, j.Name)
		if j.Verify.Status != "ok" {
			t.Errorf("job %s: verify %+v", j.Name, j.Verify)
		}
	}
	for _, j := range file.Jobs {
		want = append(want, j.Name)
	}
	slices.Sort(want)
	if !slices.Equal(names, want) || r.Counts != (batch.Counts{Done: len(want)}) {
		t.Errorf("the merged report has %v, %+v", names, r.Counts)
	}
	err = filepath.WalkDir(images, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		text, err := os.ReadFile(path)
		if err == nil && bytes.Contains(text, []byte("geheim")) {
			t.Errorf("%s has the password", path)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}
