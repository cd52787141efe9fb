from xray_fastai.cli import app

if __name__ == "__main__":
    app(prog_name="xray-fastai")
